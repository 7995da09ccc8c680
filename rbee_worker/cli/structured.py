"""Options for structured output: what generated text must match."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rbee_worker.config import GrammarSpec
from rbee_worker.errors import InvalidRequest

_PANEL = "Structured output"

JsonSchema = Annotated[
    Path | None,
    typer.Option(
        "--json-schema",
        metavar="FILE",
        help="Generate JSON that matches the JSON schema in this file.",
        rich_help_panel=_PANEL,
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(
        "--regex", metavar="REGEX", help="Generate text that matches this regular expression.", rich_help_panel=_PANEL
    ),
]
Grammar = Annotated[
    Path | None,
    typer.Option(
        "--grammar",
        metavar="FILE",
        help="Generate text that matches the Lark grammar in this file.",
        rich_help_panel=_PANEL,
    ),
]


def read_grammar(json_schema: Path | None, regex: str | None, grammar: Path | None) -> GrammarSpec | None:
    """The grammar that the options give; None: no option is given.

    Raises:
        InvalidRequest: several options are given, a file cannot be read, or a schema is not a JSON object.
    """
    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InvalidRequest(f"{' and '.join(names)}: give one of them.")
    if json_schema is not None:
        return GrammarSpec("json_schema", _read_schema(json_schema), "--json-schema")
    if grammar is not None:
        return GrammarSpec("lark", _read("--grammar", grammar), "--grammar")
    return GrammarSpec("regex", regex, "--regex") if regex is not None else None


def _read_schema(path: Path) -> str:
    text = _read("--json-schema", path)
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise InvalidRequest(f"--json-schema: {where}: not JSON: {error.msg}.") from None
    except RecursionError:
        raise InvalidRequest(f"--json-schema: {path} is nested too deeply.") from None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"--json-schema: {path} holds no JSON object.", hint='A schema looks like {"type": …}.')
    return text


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise InvalidRequest(f"{option}: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{option}: {path} is not UTF-8 at byte {error.start}.") from None
