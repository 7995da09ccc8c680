"""Names and values of model files that would draw on a terminal or forge a line: what the commands show of them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import CONFIG, write_tiny_model

from .conftest import run

DRAWS = "x\x1b[31m\r\nerror: forged\x9b2J\u202ey"


def config(**values: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_tiny_model(folder)
        (folder / "config.json").write_text(json.dumps(CONFIG | values))
        return folder

    return write


def header(entries: dict[str, Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_tiny_model(folder)
        text = json.dumps(entries).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        return folder

    return write


def file_names(folder: Path) -> Path:
    write_tiny_model(folder)
    for letter in "ab":
        (folder / f"{letter}{DRAWS}.safetensors").write_bytes(b"")
    (folder / "model.safetensors").unlink()
    return folder


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(*pairs: tuple[str, str | int]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder.mkdir()
        head = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(pairs))
        for key, value in pairs:
            head += text(key) + (
                struct.pack("<II", 4, value) if isinstance(value, int) else b"\x08\0\0\0" + text(value)
            )
        (folder / "model.gguf").write_bytes(head + bytes(64))
        return folder / "model.gguf"

    return write


LLAMA = [
    ("general.architecture", "llama"),
    *((f"llama.{key}", 4) for key in ("embedding_length", "block_count", "attention.head_count", "context_length")),
    ("llama.feed_forward_length", 4),
]


@pytest.mark.parametrize(
    "write",
    [
        config(architectures=[DRAWS]),
        config(**{f"rope_{DRAWS}": 2}),
        config(hidden_act=DRAWS),
        config(hidden_size=DRAWS),
        config(quantization_config={"quant_method": DRAWS}),
        config(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32, DRAWS: 1}),
        header({DRAWS: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        header({"x": {"dtype": DRAWS, "shape": [1], "data_offsets": [0, 4]}}),
        file_names,
        gguf(("general.architecture", DRAWS)),
        gguf((DRAWS, 1), (DRAWS, 2)),
        gguf(*LLAMA, ("llama.expert_count", DRAWS)),
        gguf(*LLAMA, ("llama.rope.scaling.type", "yarn"), (f"llama.rope.scaling.{DRAWS}", 1)),
    ],
    ids=[
        "architecture", "key of the config", "activation", "size", "quantization", "key of the quantization",
        "tensor", "dtype", "files", "GGUF architecture", "GGUF key", "GGUF value", "GGUF key of the family",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["load", "inspect"])
def test_what_a_model_says_of_itself_cannot_draw(tmp_path: Path, command: str, write: Callable[[Path], Path]) -> None:
    done = run(command, str(write(tmp_path / "model")))
    assert done.returncode in {3, 4}, done.stderr
    lines = done.stderr.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines), done.stderr
    told = [line for line in lines if line.startswith("error: ")]
    assert len(told) == 1
    assert len(told[0]) < 1000
