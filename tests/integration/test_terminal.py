"""On a terminal: bars that move, text that streams, Ctrl-C that behaves."""

import re
from pathlib import Path

import pexpect
import pytest
from pexpect.fdpexpect import fdspawn

from . import forking
from .conftest import CAN_FORK, PROGRAM, environment, fork_server, forks

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="needs os.pidfd_open")

BAR = "\N{BOX DRAWINGS HEAVY HORIZONTAL}"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


CTRL_C = "\x03"


class OnTerminal(fdspawn):
    """The program on a terminal of 40 rows and 110 columns."""

    def __init__(self, *arguments: str, **env: str) -> None:
        own = environment(TERM="xterm-256color", **env)
        assert forks(own)
        self.program = forking.OnTerminal(fork_server(), [PROGRAM, *arguments], own, rows=40, columns=110)
        super().__init__(self.program.terminal, encoding="utf-8", timeout=60)

    def end(self) -> tuple[str, int]:
        """Everything drawn until the program ends, and its exit code."""
        self.expect(pexpect.EOF)
        self.close()
        return str(self.before), self.program.wait(60)


def test_loading_draws_bars_that_move_and_a_report(model_dir: Path) -> None:
    drawn, code = OnTerminal("load", str(model_dir / "model.safetensors")).end()
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
    drawn, _ = OnTerminal("load", str(tiny), NO_COLOR="1").end()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", drawn)


def test_generating_shows_bars_then_the_text(model_dir: Path) -> None:
    question = "What is the capital of France?"
    drawn, code = OnTerminal("generate", "-m", str(model_dir), "-p", question, "--temperature", "0").end()
    assert code == 0
    assert BAR in drawn
    assert "The capital of France is Paris." in drawn


@pytest.mark.parametrize("command", ["load", "generate"])
def test_ctrl_c_while_loading(gguf_path: Path, command: str) -> None:
    arguments = (command, str(gguf_path)) if command == "load" else (command, "-m", str(gguf_path), "-p", "x")
    child = OnTerminal(*arguments)
    child.expect("layers")
    child.send(CTRL_C)
    drawn, code = child.end()
    assert code == 130
    assert "cancelled" in drawn
    assert "Traceback" not in drawn


def test_ctrl_c_while_generating(model_dir: Path) -> None:
    # Greedy, the model goes on for hundreds of tokens: it has not ended by itself when the signal comes.
    child = OnTerminal("generate", "-m", str(model_dir), "-p", "Write a long story about a dog.", "--temperature", "0")
    child.expect("ready")
    child.expect(r"\w\w+ ")
    child.send(CTRL_C)
    drawn, code = child.end()
    assert code == 130
    assert "Traceback" not in drawn


def test_converting_draws_a_bar(tiny: Path, tmp_path: Path) -> None:
    drawn, code = OnTerminal("convert", str(tiny), str(tmp_path / "out")).end()
    plain = ANSI.sub("", drawn)
    assert code == 0
    assert BAR in plain
    counts = re.findall(r"(\d+)/(\d+) tensors", plain)
    assert counts
    assert counts[-1][0] == counts[-1][1]
    assert "\x1b[?25h" in drawn, "the cursor is shown again"
