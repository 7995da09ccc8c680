"""Writes the reference in ``docs/cli.md`` and the completion scripts, both from the commands themselves.

``python -m rbee_worker.cli.reference`` writes them. A test fails when they are out of date. The result does not depend
on the terminal, the environment or the locale.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer._completion_shared import get_completion_script

from rbee_worker.cli.app import app

PROGRAM = "rbee-worker"
COMPLETE_VARIABLE = "_RBEE_WORKER_COMPLETE"
BEGIN = "<!-- reference: written by python -m rbee_worker.cli.reference -->"
END = "<!-- end of the reference -->"

SHELLS: Mapping[str, str] = {
    "bash": "rbee-worker.bash",
    "zsh": "_rbee-worker",  # zsh looks for this name along fpath
    "fish": "rbee-worker.fish",
    "powershell": "rbee-worker.ps1",
}
"""Typer's name of a shell -> file in ``completions/``."""


def completion_scripts() -> dict[str, str]:
    """File name -> script. It is Typer's own script, the same that ``--show-completion`` prints."""
    return {
        name: get_completion_script(prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE, shell=shell) + "\n"
        for shell, name in SHELLS.items()
    }


def insert_reference(page: str) -> str:
    """The page, with the part between the two marks replaced by the current reference.

    Raises:
        ValueError: a mark is missing.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks one of its marks: {BEGIN} … {END}")
    return f"{head}{BEGIN}\n\n{reference()}\n{END}{tail}"


def reference() -> str:
    """The reference in Markdown: a section for each command."""
    group: Any = typer.main.get_command(app)
    return "\n".join(section for name, command in _commands(group) for section in _command(name, command))


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, such as ``bench load``."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"## {PROGRAM} {name}\n"
    example = ""
    for paragraph in inspect.cleandoc(command.help).split("\n\n"):
        text = " ".join(paragraph.split())
        if text.startswith("Example: "):
            example = text.removeprefix("Example: ")
        else:
            yield f"{text}\n"
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join(p.metavar if p.required else f"[{p.metavar}]" for p in arguments)
    yield f"```console\n$ {PROGRAM} {name} [OPTIONS]{' ' if usage else ''}{usage}\n$ {example}\n```\n"
    for argument in arguments:
        yield f"`{argument.metavar}`: {_explained(argument)}\n"
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(option.rich_help_panel or "Options", []).append(option)
    for panel, members in panels.items():
        yield f"| {panel} | default | |\n|---|---|---|\n" + "".join(map(_row, members))


def _row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    value = "" if option.is_flag else f" `{option.metavar}`"
    default = option.default() if callable(option.default) else option.default
    shown = "" if default is None or default is False or default == [] else f"`{default}`"
    if option.required:
        shown = "required"
    return f"| {_cell(names + value)} | {shown} | {_cell(_explained(option))} |\n"


def _explained(parameter: Any) -> str:
    return str(parameter.help) + (f" Environment: `{parameter.envvar}`." if parameter.envvar else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(root: Path) -> None:
    """Write ``docs/cli.md`` and ``completions/`` below ``root``."""
    page = root / "docs" / "cli.md"
    page.write_text(insert_reference(page.read_text("utf-8")), "utf-8")
    folder = root / "completions"
    folder.mkdir(exist_ok=True)
    for name, script in completion_scripts().items():
        (folder / name).write_text(script, "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
