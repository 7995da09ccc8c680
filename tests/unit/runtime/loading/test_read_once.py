"""A load reads each small file and each header once: opens are counted by the interpreter, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tiny import CHAT_TEMPLATE, write_tiny_model

COUNTING = """
import collections, json, sys
from pathlib import Path
from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig
from rbee_worker.runtime.loading.load import load_model

folder, opened = Path(sys.argv[1]).parent, collections.Counter()

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
*_, last = load_model(sys.argv[2], EngineConfig(device="cpu"), Cancellation(), lambda model: None)
print(json.dumps([last.stage, opened]))
"""


def opened(inside: Path, model: Path) -> dict[str, int]:
    """How often each file beside ``inside`` is opened by a load of ``model``."""
    command = [sys.executable, "-c", COUNTING, str(inside), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stage, counts = json.loads(done.stdout)
    assert stage == "ready"
    counts.pop("weights")
    return dict(counts)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_folder(tmp_path: Path, *, quantized: bool) -> None:
    # Where a method is named, the loader asks for it; these tensors are all plain.
    method = {"quantization_config": {"quant_method": "fp8"}} if quantized else {}
    path = write_tiny_model(tmp_path / "m", chat_template=CHAT_TEMPLATE, **method)
    (path / "generation_config.json").write_text("{}")
    (path / "special_tokens_map.json").write_text("{}")
    (path / "added_tokens.json").write_text("{}")
    assert opened(path / "config.json", path) == {
        "added_tokens.json": 1,
        "config.json": 1,
        "generation_config.json": 1,
        "headers": 1,
        "special_tokens_map.json": 1,
        "tokenizer.json": 1,
        "tokenizer_config.json": 1,
    }


def test_a_gguf_file(tmp_path: Path, files: SimpleNamespace) -> None:
    path = files.write_gguf(tmp_path / "model.gguf")
    assert opened(path, path) == {"headers": 1}
