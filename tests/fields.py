"""Writes the sampling parameters into tables of ``docs``, from ``rbee_worker.config``: ``python -m tests.fields``."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import get_args, get_type_hints

from rbee_worker.config import PARAMS, RANGES, SamplingParams
from rbee_worker.server.bodies import SamplingFields

DOCS = Path(__file__).parents[1] / "docs"

TYPES = {bool: "boolean", int: "integer", float: "number"}
_OWN_ROWS = {"max_tokens", "skip_special_tokens", "logit_bias", "grammar"}
"""Parameters that the page of OpenAI's routes explains itself."""
_AS_NATIVE = re.compile(r"^\| `.*` (?=\| \| \| \[as in `/v1/inference`\])", re.MULTILINE)


def row(name: str) -> str | None:
    """A parameter's row in the table of ``POST /v1/inference``; None: it is no number and no boolean."""
    kind, default = get_type_hints(SamplingParams)[name], asdict(SamplingParams())[name]
    number = next((kind for kind in get_args(kind) if kind in TYPES), kind)
    if number not in TYPES or (number is not bool and name not in RANGES):
        return None
    told = PARAMS[name].unset if default is None else str(default).lower()
    bounds = f"{RANGES[name]} " if name in RANGES else ""
    return f"| `{name}` | {TYPES[number]} | {told} | {bounds}|"


def insert_rows(page: str) -> str:
    """``docs/http-api.md`` with the rows of today's parameters; a new one comes after the one before it."""
    before = ""
    for name in PARAMS:
        written, old = row(name), re.search(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        if old is not None and written is not None:
            page = page[: old.start()] + written + page[old.end() :]
        elif written is not None:
            page = page.replace(before, f"{before}\n{written}", 1)
        before = written or (old[0] if old is not None else before)
    return page


def insert_names(page: str) -> str:
    """``docs/openai.md`` with the names of the parameters that are as in ``POST /v1/inference``."""
    names = [name for name in PARAMS if name in SamplingFields.model_fields and name not in _OWN_ROWS]
    return _AS_NATIVE.sub(f"| {', '.join(f'`{name}`' for name in names)} ", page)


PAGES = {"http-api.md": insert_rows, "openai.md": insert_names}


if __name__ == "__main__":
    for file, insert in PAGES.items():
        (DOCS / file).write_text(insert((DOCS / file).read_text("utf-8")), "utf-8")
