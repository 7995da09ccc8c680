"""The ``--help`` of the app and of each command, and the environment variables that they name.

They are rendered by a process of its own: Typer reads the terminal's width and colors when it is imported.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from rbee_worker.cli.app import app

ROOT = Path(__file__).parents[2]
PROGRAM = "rbee-worker"
WIDTH = "100"
_VARIABLE = re.compile(r"\bRBEE_\w+")


def take(_folder: Path) -> dict[str, str]:
    """A file for each command, and ``environment.txt``."""
    # Nothing of this process's environment but what finds Python's packages.
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME", "SYSTEMROOT") if name in os.environ}
    pinned = {"COLUMNS": WIDTH, "TERMINAL_WIDTH": WIDTH, "TERM": "dumb", "NO_COLOR": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.snapshots.commands"],
        cwd=ROOT, env=kept | pinned, check=True, timeout=120, stdout=subprocess.PIPE,
    )  # fmt: skip
    helps: dict[str, str] = json.loads(done.stdout)
    named = sorted({(variable, name) for name, text in helps.items() for variable in _VARIABLE.findall(text)})
    files = {f"{name.replace(' ', '-')}.txt": text for name, text in helps.items()}
    return files | {"environment.txt": "".join(f"{variable:24}{name}\n" for variable, name in named)}


def rendered() -> dict[str, str]:
    """Whole name of each command -> its help, with the options that it does not show."""
    runner = CliRunner()
    texts = {}
    for words, command in walk(typer.main.get_command(app)):
        result = runner.invoke(app, [*words, "--help"], prog_name=PROGRAM, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        shown = "".join(f"{text.rstrip()}\n" for text in result.stdout.strip().splitlines())
        hidden = [
            f"Hidden: {', '.join(option.opts)}\n" for option in command.params if getattr(option, "hidden", False)
        ]
        texts[" ".join([PROGRAM, *words])] = shown + "".join(hidden)
    return texts


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The command, and those below it."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*words, name))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(rendered()))
