"""``docs/files.md``: a line for each module, from its docstring. ``python -m tests.files`` writes it."""

import ast
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "files.md"

HEAD = """\
# Files

What each module of the package is for, in its own words. This page is made from the docstrings: `make docs` writes it.
[Architecture](architecture.md) says in which order to read them.
"""


def page() -> str:
    """The page: a section for each folder, a row for each of its modules."""
    modules = sorted((ROOT / "rbee_worker").rglob("*.py"), key=lambda path: (path.parent.as_posix(), path.name))
    return "\n".join((HEAD, *_sections(modules)))


def _sections(modules: list[Path]) -> Iterator[str]:
    for folder, files in groupby(modules, key=lambda path: path.parent):
        summaries = {path.name: _summary(path) for path in files}
        about = summaries.pop("__init__.py", "")
        yield f"## `{folder.relative_to(ROOT).as_posix()}`\n"
        if about:
            yield f"{about}\n"
        if summaries:
            yield "| module | what it is |\n|---|---|"
            yield "".join(f"| `{name}` | {text} |\n" for name, text in summaries.items())


def _summary(path: Path) -> str:
    """The first paragraph of a module's docstring, as Markdown in one line."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    if not text:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring")
    plain = re.sub(r":\w+:`[~.\w]*?(\w+)`", r"`\1`", text.partition("\n\n")[0]).replace("``", "`").replace("|", "\\|")
    return " ".join(plain.split())


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
