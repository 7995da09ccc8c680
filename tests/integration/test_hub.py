"""``rbee-worker`` with hub ids, against a hub on this machine: what a user sees of downloads and of their faults."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rbee_worker.conformance.order import faults_in
from tests.hub_server import LISTING, HubServer, Repo, sharded_repo, tiny_repo

from .conftest import SECONDS, events_of, run, serving, start

WEIGHTS = "model.safetensors"
NEEDED = ("config.json", "generation_config.json", "tokenizer.json", WEIGHTS)


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Repo]:
    base = tmp_path_factory.mktemp("repos")
    return {"org/tiny": tiny_repo(base / "tiny"), "org/sharded": sharded_repo(base / "sharded")}


@pytest.fixture
def hub(repos: dict[str, Repo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub of every program that the test starts; its cache is empty."""
    with HubServer() as server:
        server.repos = {name: Repo(dict(repo.files)) for name, repo in repos.items()}
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield server


def load(model: str = "org/tiny", **env: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, events and stderr of ``load --json``."""
    done = run("load", model, "--json", "--device", "cpu", **env)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def stages(events: list[dict[str, Any]]) -> list[str]:
    """The stages in order, each once."""
    names = [event["stage"] for event in events]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def downloads(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["stage"] == "downloading"]


def size_of(hub: HubServer, name: str = "org/tiny") -> int:
    return sum(len(hub.repos[name].files[file]) for file in NEEDED)


def until_weights(hub: HubServer, folder: Path, more_than: int = 0) -> None:
    """Wait until so many bytes of the weights are on disk."""
    deadline = time.monotonic() + SECONDS
    while not (hub.gets(WEIGHTS) and any(path.stat().st_size > more_than for path in partials(folder))):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob("*.incomplete"))


# -- what it looks like


@pytest.mark.parametrize("model", ["org/tiny", "org/sharded@main"])
def test_events_of_a_slow_download(hub: HubServer, model: str) -> None:
    hub.rate = 400_000
    code, events, errors = load(model)
    assert (code, errors) == (0, "")
    assert stages(events) == ["resolving", "downloading", "loading_to_vram", "warming_up", "ready"]
    assert faults_in(events) == []
    assert events[0]["seq"] == 0
    repo = hub.repos[model.partition("@")[0]]
    total = sum(len(repo.files[name]) for name in hub.fetched())
    counts = [event["bytes_downloaded"] for event in downloads(events)]
    assert {event["bytes_total"] for event in downloads(events)} == {total}
    assert counts == sorted(counts)
    assert counts[-1] == total
    times = [event["elapsed_seconds"] for event in downloads(events)]
    assert len([count for count in counts if 0 < count < total]) >= 2
    assert max(b - a for a, b in itertools.pairwise(times)) < 1
    report = events[-1]["report"]
    assert report["model"] == model.partition("@")[0]
    assert list(report["phases"]) == ["resolving", "downloading", "loading_to_vram", "warming_up"]
    again = load(model)
    assert again[0] == 0
    assert stages(again[1]) == ["resolving", "loading_to_vram", "warming_up", "ready"]
    assert "downloading" not in again[1][-1]["report"]["phases"]


@pytest.mark.usefixtures("hub")
def test_plain_lines() -> None:
    done = run("load", "org/tiny", "--device", "cpu")
    assert done.returncode == 0
    assert re.search(r"downloading: 1/1 MiB, [\d.]+ MB/s\n", done.stderr)
    assert re.search(r"  downloading: [\d.]+ s\n", done.stderr)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_other_commands_download_too(tmp_path: Path, command: str) -> None:
    out = (str(tmp_path / "out"),) if command == "convert" else ()
    done = run(command, "org/tiny", *out)
    assert done.returncode == 0, done.stderr
    assert "downloading: 1/1 MiB" in done.stderr
    again = run(command, "org/tiny", *out, *(() if out else ("--json",)))
    assert again.returncode == 0
    assert "downloading" not in again.stderr
    if not out:
        assert json.loads(again.stdout)["name"] == "org/tiny"


def test_a_server_shows_the_download(hub: HubServer) -> None:
    go_on = hub.hold(WEIGHTS, 100_000)
    with serving("--model", "org/tiny", "--device", "cpu", wait=False) as worker:
        seen: list[bytes] = []
        with httpx.stream("GET", worker.url + "/v1/loading/progress", timeout=SECONDS) as response:
            for chunk in response.iter_bytes():
                seen.append(chunk)
                if any(event["bytes_downloaded"] > 0 for event in told(seen)):
                    go_on.set()
        events = events_of(b"".join(seen))
        assert "downloading" in stages(events)
        assert stages(events)[-1] == "ready"
        assert worker.infer(prompt="hello", max_tokens=2)[-1]["event"] == "end"


def told(chunks: list[bytes]) -> list[dict[str, Any]]:
    lines = b"".join(chunks).rpartition(b"\n\n")[0].splitlines()
    return downloads([json.loads(line[6:]) for line in lines if line.startswith(b'data: {"stage"')])


# -- faults


@pytest.mark.parametrize("name", [LISTING, "config.json", "tokenizer.json", WEIGHTS])
def test_a_connection_cut_at_any_stage_is_resumed(hub: HubServer, name: str) -> None:
    hub.cut(name, 150)
    code, events, errors = load()
    assert (code, errors) == (0, "")
    assert stages(events)[-1] == "ready"
    assert downloads(events)[-1]["bytes_downloaded"] == size_of(hub)
    assert [asked.range for asked in hub.gets(name)] == [None, None if name == LISTING else "bytes=150-"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_goes_on_where_it_was(hub: HubServer, tmp_path: Path, signum: int) -> None:
    hub.rate = 100_000
    process = start("load", "org/tiny", "--json", "--device", "cpu")
    until_weights(hub, tmp_path, 10_000)
    process.send_signal(signum)
    out, errors = process.communicate(timeout=SECONDS)
    (kept,) = partials(tmp_path)
    size = kept.stat().st_size
    if signum == signal.SIGINT:
        assert process.returncode == 130
        events = [json.loads(line) for line in out.splitlines()]
        assert stages(events) == ["resolving", "downloading", "cancelled"]
        assert "Traceback" not in errors
    hub.mend()
    code, events, _ = load()
    assert code == 0
    present = size_of(hub) - len(hub.repos["org/tiny"].files[WEIGHTS])
    assert downloads(events)[0]["bytes_downloaded"] == present + size
    assert [asked.range for asked in hub.gets(WEIGHTS)] == [None, f"bytes={size}-"]
    assert partials(tmp_path) == []


def test_two_processes_fetch_once(hub: HubServer) -> None:
    hub.rate = 500_000
    processes = [start("load", "org/tiny", "--quiet", "--device", "cpu") for _ in range(2)]
    assert [process.wait(SECONDS) for process in processes] == [0, 0]
    for process in processes:
        process.communicate()
    assert len(hub.gets(WEIGHTS)) == 1


def test_offline(hub: HubServer) -> None:
    code, events, errors = load(HF_HUB_OFFLINE="1")
    assert code == 3
    assert events[-1]["code"] == "MODEL_NOT_FOUND"
    assert "HF_HUB_OFFLINE is set" in events[-1]["message"]
    assert "HF_HUB_OFFLINE is set" in errors
    assert hub.asked == []
    assert load()[0] == 0
    hub.asked.clear()
    code, events, errors = load(HF_HUB_OFFLINE="1")
    assert (code, errors) == (0, "")
    assert stages(events)[-1] == "ready"
    assert hub.asked == []


def gated(hub: HubServer) -> None:
    hub.repos["org/tiny"].gated = True


def spoiled(hub: HubServer) -> None:
    hub.send(WEIGHTS, bytes(len(hub.repos["org/tiny"].files[WEIGHTS])))


def unknown(hub: HubServer) -> None:
    hub.repos.clear()


def forbidden(hub: HubServer) -> None:
    hub.refuse(WEIGHTS, 403)


def ggufs(hub: HubServer) -> None:
    hub.repos["org/tiny"].files = {"a.Q4.gguf": b"", "b.Q8.gguf": b""}


def shard_missing(hub: HubServer) -> None:
    files = hub.repos["org/tiny"].files
    files["model.safetensors.index.json"] = b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'


FAULTS = [
    (gated, "MODEL_NOT_FOUND", "accepted its terms"),
    (spoiled, "MODEL_MALFORMED", "SHA-256"),
    (unknown, "MODEL_NOT_FOUND", "neither a path here nor a model on the hub"),
    (forbidden, "MODEL_NOT_FOUND", "HTTP status 403"),
    (ggufs, "MODEL_NOT_FOUND", "2 GGUF files in this repository: a.Q4.gguf, b.Q8.gguf"),
    (shard_missing, "MODEL_MALFORMED", "names 'model-00001-of-00001.safetensors', which the repository lacks"),
]


@pytest.mark.parametrize(("order", "error", "message"), FAULTS, ids=[case[0].__name__ for case in FAULTS])
def test_what_cannot_be_had(hub: HubServer, order: Any, error: str, message: str) -> None:
    order(hub)
    code, events, errors = load()
    assert code == 3, errors
    assert (events[-1]["stage"], events[-1]["code"]) == ("error", error)
    assert message in events[-1]["message"]
    assert "org/tiny" in events[-1]["message"]
    assert message in errors
    assert "Traceback" not in errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = shutil.which("mount")
    folder = tmp_path / "small"
    folder.mkdir()
    command = [str(mount), "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system (the unit tests imitate one)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    path = folder / "filler"
    room = shutil.disk_usage(folder).free - leave
    with path.open("wb") as stream:
        stream.write(bytes(room))
    return path


def test_a_disk_too_small_is_said_before_a_byte(hub: HubServer, small_disk: Path) -> None:
    fill(small_disk, leave=200 * 1024)
    code, events, errors = load(HF_HOME=str(small_disk))
    assert code == 1
    assert events[-1]["code"] == "DISK_FULL"
    assert f"{size_of(hub):,} bytes are still to be fetched, and 204,800 bytes are free" in errors
    assert hub.fetched() == set()


def test_a_disk_that_fills_up_on_the_way(hub: HubServer, small_disk: Path) -> None:
    go_on = hub.hold(WEIGHTS, 100_000)
    done: list[tuple[int, list[dict[str, Any]], str]] = []
    thread = threading.Thread(target=lambda: done.append(load(HF_HOME=str(small_disk))))
    thread.start()
    until_weights(hub, small_disk, 99_999)
    filler = fill(small_disk, leave=100 * 1024)
    go_on.set()
    thread.join(SECONDS)
    code, events, errors = done[0]
    assert code == 1
    assert events[-1]["code"] == "DISK_FULL"
    assert re.search(rf"{WEIGHTS}: [\d,]+ bytes are still to be fetched, and 0 bytes are free in {small_disk}", errors)
    filler.unlink()
    hub.mend()
    code, events, _ = load(HF_HOME=str(small_disk))
    assert code == 0
    assert str(hub.gets(WEIGHTS)[-1].range) != "None"
