"""A load reads each small file and each header once: opens are counted by the interpreter, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tiny import CHAT_TEMPLATE, write_tiny_model

COUNTING = """
import collections, json, sys
from pathlib import Path
from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig
from rbee_worker.runtime.loading.load import load_model

def note(event, arguments):
    if event != "open" or not isinstance(arguments[0], str) or Path(arguments[0]).parent != folder:
        return
    name, frame = Path(arguments[0]).name, sys._getframe()
    if name.endswith((".safetensors", ".gguf")):  # readers of the weights open it again, as often as they like
        while frame is not None and frame.f_code.co_name != "read_header":
            frame = frame.f_back
        name = "headers" if frame is not None else "weights"
    opened[name] += 1

sys.addaudithook(note)
for model in map(Path, sys.argv[1:]):
    folder, opened = model if model.is_dir() else model.parent, collections.Counter()
    *_, last = load_model(str(model), EngineConfig(device="cpu"), Cancellation(), lambda model: None)
    print(json.dumps([last.stage, opened]))
"""


def written(path: Path, **changes: Any) -> Path:
    write_tiny_model(path, chat_template=CHAT_TEMPLATE, **changes)
    for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json"):
        (path / name).write_text("{}")
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, files: SimpleNamespace) -> dict[str, dict[str, int]]:
    """By model, how often a load opens each file beside it."""
    folder = tmp_path_factory.mktemp("read-once")
    models = {
        "plain": written(folder / "plain"),
        # Where a method is named, the loader asks for it; these tensors are all plain.
        "quantized": written(folder / "quantized", quantization_config={"quant_method": "fp8"}),
        "gguf": files.write_gguf(folder / "model.gguf"),
    }
    command = [sys.executable, "-c", COUNTING, *map(str, models.values())]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    counts = {}
    for name, line in zip(models, lines, strict=True):
        stage, counts[name] = json.loads(line)
        assert stage == "ready"
        counts[name].pop("weights")
    return counts


@pytest.mark.parametrize("name", ["plain", "quantized"])
def test_a_folder(opened: dict[str, dict[str, int]], name: str) -> None:
    assert opened[name] == {
        "added_tokens.json": 1,
        "config.json": 1,
        "generation_config.json": 1,
        "headers": 1,
        "special_tokens_map.json": 1,
        "tokenizer.json": 1,
        "tokenizer_config.json": 1,
    }


def test_a_gguf_file(opened: dict[str, dict[str, int]]) -> None:
    assert opened["gguf"] == {"headers": 1}
