"""``inspect`` and ``convert``: the real ones, which need no torch."""

import json
import signal
from pathlib import Path

from rbee_worker.cli.convert import plain_lines
from rbee_worker.cli.failures import Interrupted
from rbee_worker.errors import (
    WorkerUnreachable,
)
from tests.unit.cli.harness import run
from tests.unit.runtime.conftest import write_gguf


def test_inspect_names_what_is_not_there(tmp_path: Path):
    result = run("inspect", str(tmp_path / "absent.gguf"))
    assert result.exit_code == 3
    assert "absent.gguf" in result.stderr


def test_inspect_reads_headers_alone(gguf_path: Path):
    result = run("inspect", str(gguf_path), "--max-context", "1024", "--json")
    found = json.loads(result.stdout)
    assert (found["layers"], found["context_length"]) == (30, 1024)
    table = run("inspect", str(gguf_path), "--max-context", "1024")
    assert table.exit_code == 0
    assert "LlamaForCausalLM" in table.stdout
    assert "cache of 1,024 tokens" in table.stdout
    assert table.stderr == ""


def test_convert_says_what_it_did(tmp_path: Path):
    model, out = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "out"
    result = run("convert", str(model), str(out))
    assert result.exit_code == 0
    assert (out / "model.safetensors").is_file()
    assert "11 tensors" in result.stderr
    assert result.stdout == ""
    again = run("convert", str(model), str(out), "--json")
    assert json.loads(again.stdout)["already_converted"] is True


def test_convert_says_nothing_when_told_to(tmp_path: Path):
    result = run("convert", str(write_gguf(tmp_path / "tiny.gguf")), str(tmp_path / "out"), "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_convert_lines_are_one_a_second():
    from rbee_worker.runtime.convert import ConvertProgress

    class Out(list[str]):
        write = list.append

        def flush(self) -> None:
            """Nothing is held back."""

    out, now = Out(), [0.0]
    show = plain_lines(out, clock=lambda: now[0])  # type: ignore[arg-type]
    for n in range(1, 101):
        now[0] = n / 16  # exact in binary
        show(ConvertProgress(n, 100, n, 100, finished=n == 100))
    assert [line.split("/")[0] for line in out] == ["1", "17", "33", "49", "65", "81", "97", "100"]


def test_interrupted_carries_its_code():
    assert (Interrupted(signal.SIGINT).exit_code, Interrupted(signal.SIGTERM).exit_code) == (130, 143)
    assert WorkerUnreachable.exit_code == 6
