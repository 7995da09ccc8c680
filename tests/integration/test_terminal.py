"""On a terminal: bars that move, text that streams, Ctrl-C that behaves."""

import re
from pathlib import Path

import pexpect
import pytest

from .conftest import PROGRAM, environment

BAR = "\N{BOX DRAWINGS HEAVY HORIZONTAL}"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def spawn(*arguments: str, **env: str) -> "pexpect.spawn[str]":
    return pexpect.spawn(
        PROGRAM,
        list(arguments),
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 110),
        env=environment(TERM="xterm-256color", **env),
    )


def end_of(child: "pexpect.spawn[str]") -> tuple[str, int | None]:
    """Everything drawn until the program ends, and its exit code."""
    child.expect(pexpect.EOF)
    child.close()
    return str(child.before), child.exitstatus


def test_loading_draws_bars_that_move_and_a_report(model_dir: Path) -> None:
    drawn, code = end_of(spawn("load", str(model_dir / "model.safetensors")))
    plain = ANSI.sub("", drawn)
    assert code == 0
    assert BAR in plain
    assert "\x1b[" in drawn
    counts = [int(count) for count in re.findall(r"(\d+)/30 layers", plain)]
    assert counts == sorted(counts)
    assert len(set(counts)) > 1
    assert counts[-1] == 30
    assert re.search(r"memory [\d,]+/[\d,]+ MiB", plain)
    assert re.search(r"bytes .*MiB, [\d,]+ MB/s", plain)
    assert "Load report" in plain
    assert "peak host memory" in plain
    assert "\x1b[?25h" in drawn, "the cursor is shown again"


def test_colours_are_left_out_on_request(tiny: Path) -> None:
    drawn, _ = end_of(spawn("load", str(tiny), NO_COLOR="1"))
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", drawn)


def test_generating_shows_bars_then_the_text(model_dir: Path) -> None:
    question = "What is the capital of France?"
    drawn, code = end_of(spawn("generate", "-m", str(model_dir), "-p", question, "--temperature", "0"))
    assert code == 0
    assert BAR in drawn
    assert "The capital of France is Paris." in drawn


@pytest.mark.parametrize("command", ["load", "generate"])
def test_ctrl_c_while_loading(gguf_path: Path, command: str) -> None:
    arguments = (command, str(gguf_path)) if command == "load" else (command, "-m", str(gguf_path), "-p", "x")
    child = spawn(*arguments)
    child.expect("layers")
    child.sendintr()
    drawn, code = end_of(child)
    assert code == 130
    assert "cancelled" in drawn
    assert "Traceback" not in drawn


def test_ctrl_c_while_generating(model_dir: Path) -> None:
    # Greedy, the model goes on for hundreds of tokens: it has not ended by itself when the signal comes.
    child = spawn("generate", "-m", str(model_dir), "-p", "Write a long story about a dog.", "--temperature", "0")
    child.expect("ready")
    child.expect(r"\w\w+ ")
    child.sendintr()
    drawn, code = end_of(child)
    assert code == 130
    assert "Traceback" not in drawn
