"""Compares and writes the files of a group."""

from collections.abc import Mapping
from difflib import unified_diff
from pathlib import Path

HERE = Path(__file__).parent
RULE = (
    "This is what users rely on. If the change is meant: run `make snapshots`, look at the diff, commit it, and add a "
    "line to CHANGELOG.md. If not: it is a defect."
)


def differences(folder: Path, taken: Mapping[str, str]) -> str:
    """A unified diff from the files of ``folder`` to those ``taken``, and what to do; empty when they are the same."""
    there = stored(folder)
    diffs = [
        "".join(
            unified_diff(
                there.get(name, "").splitlines(keepends=True),
                taken.get(name, "").splitlines(keepends=True),
                f"{folder.name}/{name}" if name in there else "/dev/null",
                f"{folder.name}/{name}" if name in taken else "/dev/null",
            )
        )
        for name in sorted(there.keys() | taken.keys())
        if there.get(name) != taken.get(name)
    ]
    return "\n".join([*diffs, RULE]) if diffs else ""


def write(folder: Path, taken: Mapping[str, str]) -> None:
    """Make the files of ``folder`` those ``taken``, and no others."""
    folder.mkdir(exist_ok=True)
    for name in stored(folder).keys() - taken.keys():
        (folder / name).unlink()
    for name, text in taken.items():
        (folder / name).write_text(text, "utf-8", newline="\n")


def stored(folder: Path) -> dict[str, str]:
    """File name -> text."""
    files = folder.iterdir() if folder.is_dir() else ()
    return {file.name: file.read_bytes().decode() for file in files}
