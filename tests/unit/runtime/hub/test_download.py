"""Hub models: what is fetched and counted, the cache, and what the hub refuses, against a hub on this machine."""

import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from rbee_worker.errors import ModelError, ModelMalformed, ModelNotFound, ModelUnsupported
from rbee_worker.runtime.formats.safetensors import TEMPLATES_FOLDER as FOLDER
from rbee_worker.runtime.hub.client import MAX_TEMPLATE_BYTES, MAX_TEMPLATES, choose_files
from rbee_worker.runtime.hub.download import DownloadProgress
from rbee_worker.runtime.source import resolve
from tests.hub_server import LISTING, HubServer, Repo
from tests.unit.runtime.hub.case import NEEDED, SHARDS, WEIGHTS, downloaders, fetch, folder

# -- what is needed


def test_only_what_is_needed_is_fetched(hub: HubServer) -> None:
    path = folder()
    assert hub.fetched() == NEEDED
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        name: hub.repos["org/tiny"].files[name] for name in NEEDED
    }


def test_the_index_decides_which_shards(hub: HubServer) -> None:
    hub.repos["org/sharded"].files[WEIGHTS] = b"not needed"
    path = folder("org/sharded")
    assert hub.fetched() == NEEDED - {WEIGHTS} | {*SHARDS, "model.safetensors.index.json"}
    assert (path / SHARDS[1]).read_bytes() == hub.repos["org/sharded"].files[SHARDS[1]]


CHOICES: list[tuple[set[str], set[str] | None, list[str]]] = [
    ({"config.json", "a.bin", WEIGHTS, "x.gguf"}, None, ["config.json", WEIGHTS]),
    ({WEIGHTS, "model.fp16.safetensors", "chat_template.jinja"}, None, ["chat_template.jinja", WEIGHTS]),
    ({"consolidated.safetensors", "weights.safetensors"}, None, ["weights.safetensors"]),
    ({"a", "b", "c", "config.json"}, {"b", "a"}, ["config.json", "model.safetensors.index.json", "a", "b"]),
    ({"x.gguf", "config.json", "a.bin"}, None, ["x.gguf"]),
    ({WEIGHTS, "tokenizer.json", "tokenizer.model", "vocab.json"}, None, ["tokenizer.json", WEIGHTS]),
    ({WEIGHTS, "merges.txt", "vocab.json"}, None, ["vocab.json", "merges.txt", WEIGHTS]),
]


@pytest.mark.parametrize(("names", "shards", "chosen"), CHOICES)
def test_choice(names: set[str], shards: set[str] | None, chosen: list[str]) -> None:
    assert choose_files("org/name", names, shards) == chosen


def names_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_chat_templates_in_their_folder_are_fetched(hub: HubServer) -> None:
    repo = hub.repos["org/tiny"]
    texts = {"tool_use": b"with tools", "rag": b"with documents", "other": b"with tools"}  # two of one content
    templates = {f"{FOLDER}/{name}.jinja": text for name, text in texts.items()}
    others = (f"{FOLDER}/deeper/a.jinja", f"{FOLDER}/.jinja", f"{FOLDER}/.a.jinja", f"{FOLDER}/a.txt", "b/a.jinja")
    repo.files |= templates | dict.fromkeys(others, b"not needed")
    path = folder()
    assert hub.fetched() <= NEEDED | templates.keys()  # one content may be fetched once
    assert names_below(path) == NEEDED | templates.keys()
    assert resolve("org/tiny").chat_templates == {name: text.decode() for name, text in texts.items()}
    hub.bare = True
    repo.commit = "d" * 40
    assert names_below(folder()) == NEEDED | templates.keys()


def test_a_cache_with_a_file_where_a_folder_should_be_is_told(hub: HubServer, tmp_path: Path) -> None:
    repo = tmp_path / "cache" / "models--org--tiny"
    repo.mkdir(parents=True)
    (repo / "snapshots").write_text("")
    with pytest.raises(ModelError) as told:
        folder()
    assert told.value.message == f"org/tiny: the hub's cache cannot be read: {repo}/snapshots: Not a directory."
    assert told.value.hint == "Mend or remove it, or set HF_HOME to another folder."
    assert hub.fetched() == set()


@pytest.mark.parametrize("name", [f"{FOLDER}/../../a.jinja", f"{FOLDER}//a.jinja", f"/{FOLDER}/a.jinja", "../a.jinja"])
def test_paths_that_lead_elsewhere_are_not_followed(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.repos["org/tiny"].files[name] = b"not needed"
    path = folder()
    assert hub.fetched() == NEEDED
    assert names_below(path) == NEEDED
    assert list(tmp_path.rglob("a.jinja")) == []


def test_a_file_whose_name_would_draw_is_not_taken_for_weights(hub: HubServer) -> None:
    files = hub.repos["org/tiny"].files
    files["x\x1b[2J.safetensors"] = files.pop("model.safetensors")
    del files["pytorch_model.bin"]
    with pytest.raises(ModelNotFound, match="no weights in this repository"):
        fetch()


def test_chat_templates_are_bounded(hub: HubServer) -> None:
    repo = hub.repos["org/tiny"]
    templates = {f"{FOLDER}/{i}.jinja": b"%d" % i for i in range(MAX_TEMPLATES)}
    repo.files |= templates
    assert names_below(folder()) == NEEDED | templates.keys()
    more = f"{FOLDER}/more.jinja"
    repo.files[more] = b"one more"
    hub.asked.clear()
    with pytest.raises(ModelMalformed, match=rf"^org/tiny: {MAX_TEMPLATES + 1} chat templates in {FOLDER}; at most"):
        fetch()
    repo.files = {name: data for name, data in repo.files.items() if name not in templates}
    repo.files[more] = b" " * (MAX_TEMPLATE_BYTES + 1)
    with pytest.raises(ModelMalformed, match=rf"^org/tiny: {more} has {MAX_TEMPLATE_BYTES + 1:,} bytes, too many"):
        fetch()
    assert hub.fetched() == set()


REFUSED: list[tuple[set[str], set[str] | None, type[ModelError], str]] = [
    ({"a"}, {"a", "../b"}, ModelMalformed, r"names '\.\./b', which the repository lacks"),
    ({"a.safetensors", "b.safetensors"}, None, ModelMalformed, r"2 \.safetensors files \(a\.safetensors, b\.safet"),
    ({f"{i}.gguf" for i in range(7)}, None, ModelNotFound, r"7 GGUF files .*: 0\.gguf, 1\.gguf, .*4\.gguf, …"),
    ({"pytorch_model.bin"}, None, ModelUnsupported, r"in pytorch_model\.bin; pickle files can run code"),
    ({"README.md", "consolidated.safetensors"}, None, ModelNotFound, "no weights in this repository"),
]


@pytest.mark.parametrize(("names", "shards", "kind", "message"), REFUSED)
def test_no_choice(names: set[str], shards: set[str] | None, kind: type[ModelError], message: str) -> None:
    with pytest.raises(kind, match=f"^org/name@v1: .*{message}"):
        choose_files("org/name@v1", names, shards)


def test_a_repository_of_one_gguf_file_gives_that_file(hub: HubServer) -> None:
    hub.repos["org/gguf"] = Repo({"a.Q4.gguf": b"GGUF", "config.json": b"{}"})
    assert folder("org/gguf").name == "a.Q4.gguf"
    assert hub.fetched() == {"a.Q4.gguf"}


def test_a_damaged_index(hub: HubServer) -> None:
    hub.repos["org/sharded"].files["model.safetensors.index.json"] = b"{}"
    with pytest.raises(ModelMalformed, match="no weight_map"):
        fetch("org/sharded")


# -- counts


def test_counts_are_of_all_needed_files_and_end_at_their_total(hub: HubServer) -> None:
    hub.rate = 1_000_000
    _, steps = fetch("org/sharded")
    total = sum(len(hub.repos["org/sharded"].files[name]) for name in hub.fetched())
    counts = [step.bytes_downloaded for step in steps if isinstance(step, DownloadProgress)]
    assert len(counts) == len(steps)
    assert counts == sorted(counts)
    assert counts[-1] == total
    assert {step.bytes_total for step in steps if isinstance(step, DownloadProgress)} == {total}
    assert any(0 < count < total for count in counts)
    assert isinstance(steps[-1], DownloadProgress)
    assert 0 < steps[-1].megabytes_per_second < 2 * 1.1  # two connections


def test_a_slow_download_is_told_of_often(hub: HubServer) -> None:
    hub.rate = len(hub.repos["org/tiny"].files[WEIGHTS]) / 1.5
    _, steps = fetch()
    assert len(steps) >= 4


def test_nothing_is_said_of_what_is_in_the_cache(hub: HubServer) -> None:
    first = folder()
    hub.asked.clear()
    assert fetch() == (first, [])
    assert [asked.name for asked in hub.asked] == [LISTING]


def test_a_new_commit_fetches_what_changed(hub: HubServer) -> None:
    folder()
    hub.asked.clear()
    repo = hub.repos["org/tiny"]
    repo.files["config.json"] += b" "
    repo.commit = "d" * 40
    found, steps = fetch()
    assert found is not None
    assert found.name == "d" * 40
    assert hub.fetched() == {"config.json"}
    assert isinstance(steps[0], DownloadProgress)
    assert steps[0].bytes_downloaded == steps[0].bytes_total - len(repo.files["config.json"])


def test_revisions(hub: HubServer) -> None:
    hub.repos["org/tiny"].revisions = ("main", "refs/pr/1")
    path = folder("org/tiny@refs/pr/1")
    commit = hub.repos["org/tiny"].commit
    assert path.name == commit
    hub.asked.clear()
    assert folder(f"org/tiny@{commit}") == path
    assert hub.asked == []  # a commit never changes
    with pytest.raises(ModelNotFound, match=r"^org/tiny: the hub has no revision 'v9' of it\."):
        fetch("org/tiny@v9")


def test_a_mirror_that_lists_names_alone(hub: HubServer) -> None:
    hub.bare = True
    path = folder()
    assert (path / WEIGHTS).read_bytes() == hub.repos["org/tiny"].files[WEIGHTS]


def test_others_find_the_files_in_the_cache(hub: HubServer) -> None:
    path = folder()
    assert huggingface_hub.try_to_load_from_cache("org/tiny", WEIGHTS, cache_dir=constants.HF_HUB_CACHE) == str(
        path / WEIGHTS
    )
    hub.asked.clear()
    assert huggingface_hub.hf_hub_download("org/tiny", WEIGHTS, cache_dir=constants.HF_HUB_CACHE) == str(path / WEIGHTS)
    assert hub.gets(WEIGHTS) == []


def test_the_token_is_sent(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder()
    assert {asked.token for asked in hub.asked} == {"Bearer hf_secret"}


# -- offline


@pytest.fixture
def offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    def go() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.asked.clear()

    return go


@pytest.mark.parametrize("model", ["org/tiny", "org/sharded", "org/tiny@main"])
def test_offline_with_a_complete_cache(hub: HubServer, offline: Any, model: str) -> None:
    path = folder(model)
    offline()
    assert fetch(model) == (path, [])
    assert hub.asked == []


@pytest.mark.parametrize("missing", [WEIGHTS, None])
def test_offline_without(hub: HubServer, offline: Any, missing: str | None) -> None:
    if missing is not None:
        (folder() / missing).unlink()
    offline()
    with pytest.raises(ModelNotFound, match="not complete in the hub's cache, and HF_HUB_OFFLINE is set"):
        fetch()
    assert hub.asked == []


def test_a_hub_that_is_down_leaves_the_cache(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder()
    hub.refuse(LISTING, 503, times=9)
    assert fetch() == (path, [])
    assert "org/tiny: taken from the cache" in caplog.text
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert fetch() == (path, [])


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_a_hub_that_is_not_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ModelNotFound, match=r"the hub cannot be reached at http://127\.0\.0\.1") as caught:
        fetch()
    assert caught.value.exit_code == 3
    assert hub.asked == []


def test_something_that_is_no_hub(hub: HubServer) -> None:
    hub.repos["org/tiny"].commit = ""
    with pytest.raises(ModelNotFound, match="is no hub: its listing names no commit"):
        fetch()


def test_a_mirror_without_etags(hub: HubServer) -> None:
    hub.bare, hub.etags = True, "none"
    with pytest.raises(ModelNotFound, match=r"is no hub: it gives no size or no ETag for .* HF_ENDPOINT"):
        fetch()
    assert hub.fetched() == set()


def test_a_commit_is_noted_as_no_revision(hub: HubServer) -> None:
    commit = hub.repos["org/tiny"].commit
    assert folder(f"org/tiny@{commit}").name == commit
    assert not (Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "refs").exists()


# -- refusals


def test_unknown_and_gated(hub: HubServer) -> None:
    with pytest.raises(ModelNotFound, match=r"^org/nope: neither a path here nor a model on the hub\."):
        fetch("org/nope")
    hub.repos["org/tiny"].gated = True
    with pytest.raises(ModelNotFound, match=r"only to those who accepted its terms\. .*HF_TOKEN"):
        fetch()
    assert downloaders() == []


@pytest.mark.parametrize(("status", "hint"), [(401, "HF_TOKEN"), (404, "hf download org/tiny")])
def test_a_file_that_is_refused(hub: HubServer, status: int, hint: str) -> None:
    hub.refuse(WEIGHTS, status, times=9)
    with pytest.raises(ModelNotFound, match=rf"refused a file: org/tiny/{WEIGHTS}: HTTP status {status}.*{hint}"):
        fetch()
    assert len(hub.gets(WEIGHTS)) == 1


def test_a_repository_that_goes_away_meanwhile(hub: HubServer) -> None:
    hub.refuse(WEIGHTS, 401, X_Error_Code="RepoNotFound")
    with pytest.raises(ModelNotFound, match=r"^org/tiny: neither a path here nor a model on the hub\."):
        fetch()


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [(401, {}, "the hub refused"), (403, {"X_Error_Code": "GatedRepo"}, "the hub gives this model only to those")],
)
def test_a_file_that_is_refused_when_it_is_put_in_place(
    hub: HubServer, status: int, headers: dict[str, str], message: str
) -> None:
    hub.refuse_heads(WEIGHTS, status, **headers)
    with pytest.raises(ModelNotFound, match=f"^org/tiny: {message}"):
        fetch()


def test_a_listing_that_is_refused(hub: HubServer) -> None:
    hub.refuse(LISTING, 418, times=9)
    with pytest.raises(ModelNotFound, match=r"^org/tiny: the hub refused: .*418"):
        fetch()
