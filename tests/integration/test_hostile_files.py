"""Files of a model that would keep a process waiting, or busy: each refused at once, by the installed program."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tiny import CONFIG, write_tiny_model

from .conftest import Served, run

HANG_SECONDS = 30
"""Ten times what a command takes on a slow machine."""

Write = Callable[[Path], Path]


def pipe(name: str) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        return folder / name if name.endswith(".gguf") else folder

    return write


def device(name: str) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to("/dev/zero")
        return folder / name if name.endswith(".gguf") else folder

    return write


def content(name: str, value: Any) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return folder

    return write


def tokenizer(**parts: Any) -> Write:
    def write(folder: Path) -> Path:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | parts))
        return folder

    return write


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
AROUND = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "!", "type_id": 0}}] * 100_000 + [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"!": {"id": "!", "ids": [0], "tokens": ["!"]}},
}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (pipe("x.gguf"), "it is a named pipe, not a regular file"),
        (device("x.gguf"), "it is a device, not a regular file"),
        (pipe("additional_chat_templates/rag.jinja"), "it is a named pipe, not a regular file"),
        (device("additional_chat_templates/rag.jinja"), "it is a device, not a regular file"),
        (pipe("config.json"), "config.json"),
        (pipe("tokenizer.json"), "tokenizer.json"),
        (pipe("model.safetensors"), "model.safetensors"),
        (content("added_tokens.json", {"<x>": 2**22 - 1}), "'<x>' is listed with id 4194303"),
        (content("added_tokens.json", {"\ud800": 300}), "half of a surrogate pair"),
        (tokenizer(normalizer={"type": "Sequence", "normalizers": [DOUBLE] * 40}), "its normalizer has 40 steps"),
        (tokenizer(post_processor=AROUND), "its post_processor puts 100000 tokens"),
        (content("config.json", json.dumps(CONFIG)[:-1] + f', "x": 1{"0" * 400}}}'), "an integer of 401 digits"),
        (content("config.json", json.dumps(CONFIG)[:-1] + ', "x": [' + "{}," * 5_000_000 + "{}]}"), "commas"),
        (content("config.json", CONFIG | {"rope_scaling": {"type": "dynamic", "factor": 1e308}}), "factor is 1e+308"),
        (content("model.safetensors.index.json", {"weight_map": {"x": "y" * 5000 + ".safetensors"}}), "plain name"),
    ],
    ids=[
        "a pipe as GGUF", "a device as GGUF", "a pipe as template", "a device as template", "a pipe as config",
        "a pipe as tokenizer", "a pipe as weights", "a far token", "half a character", "a chain that doubles",
        "many tokens around", "a long integer", "many objects", "a huge factor", "a long name",
    ],
)  # fmt: skip
def test_a_hostile_file_is_one_refusal_at_once(tmp_path: Path, write: Write, message: str) -> None:
    path = write(write_tiny_model(tmp_path / "model"))
    done = run("load", str(path), timeout=HANG_SECONDS)
    assert done.returncode == 3, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in told
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("positions", [2**22, 2**24])
def test_a_model_of_a_huge_context_is_loaded_within_its_limits(tmp_path: Path, positions: int) -> None:
    path = write_tiny_model(tmp_path / "model", max_position_embeddings=positions)
    done = run("load", str(path), "--kv-cache-memory", "64MiB", timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/inference", {"prompt": "x" * 3_000_000}),
        ("/v1/completions", {"prompt": "word " * 600_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 3_000_000}]}),
    ],
)
def test_a_prompt_of_millions_of_characters_is_refused(worker: Served, route: str, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{worker.url}{route}", json=body, timeout=HANG_SECONDS)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith("The prompt has more than 8192 tokens; the context holds 4096")
    assert error["code"].lower().startswith("context")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/inference", {"messages": [{"role": "user", "content": "hi"}] * 90_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}] * 90_000}),
        ("/v1/responses", {"input": [{"role": "user", "content": "hi"}] * 90_000}),
    ],
)
def test_the_worker_answers_others_while_it_reads_very_many_messages(
    worker: Served, route: str, body: dict[str, Any]
) -> None:
    waits: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=HANG_SECONDS) as client:
            while not ended.wait(0.005):
                began = time.monotonic()
                assert client.get(f"{worker.url}/livez").status_code == 200
                waits.append(time.monotonic() - began)

    asking = threading.Thread(target=ask)
    asking.start()
    began = time.monotonic()
    try:
        answer = httpx.post(f"{worker.url}{route}", json=body, timeout=HANG_SECONDS)
    finally:
        ended.set()
        asking.join()
    assert answer.status_code == 400
    # It was half of the time; now it is a thirtieth.
    assert max(waits) < (time.monotonic() - began) / 5
