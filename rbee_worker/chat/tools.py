"""Tool definitions, in the form in which OpenAI's clients send them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rbee_worker.errors import FieldError, InvalidRequest

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: 1 to 64 letters, digits, underscores and dashes.
        description: what it does, for the model.
        parameters: the JSON schema of its arguments, which are an object.
        strict: whether parts of the schema that cannot be enforced are an error. If not, they are ignored.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool


def read_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Check a request's ``tools``.

    Args:
        tools: such as ``[{"type": "function", "function": {"name": "f", "parameters": {…}}}]``.

    Raises:
        InvalidRequest: there are bad fields; it lists all of them, such as ``tools[0].function.name``.
    """
    bad: list[FieldError] = []
    if not tools:
        bad.append(_bad("tools", "at least one tool", "is empty"))
    elif len(tools) > MAX_TOOLS:
        bad.append(_bad("tools", f"at most {MAX_TOOLS} tools", f"holds {len(tools)}"))
    else:
        found = [_read_tool(tool, f"tools[{index}]", bad) for index, tool in enumerate(tools)]
        _check_unique(found, bad)
    if bad:
        raise InvalidRequest(" ".join(error.message for error in bad), fields=bad)
    return tuple(tool for tool in found if tool is not None)


def _read_tool(tool: Any, field: str, bad: list[FieldError]) -> Tool | None:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        bad.append(_bad(f"{field}.type", '"function"', "is something else"))
        return None
    function = tool.get("function")
    if not isinstance(function, Mapping):
        bad.append(_bad(f"{field}.function", "an object", "is none"))
        return None
    errors = len(bad)
    name, parameters = function.get("name"), function.get("parameters")
    description, strict = function.get("description") or "", function.get("strict") or False
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        bad.append(_bad(f"{field}.function.name", "1 to 64 of the characters A-Z a-z 0-9 _ -", "is not"))
    if not isinstance(description, str):
        bad.append(_bad(f"{field}.function.description", "a string", "is none"))
    if not isinstance(strict, bool):
        bad.append(_bad(f"{field}.function.strict", "a boolean", "is none"))
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    elif not isinstance(parameters, Mapping):
        bad.append(_bad(f"{field}.function.parameters", "a JSON schema, an object", "is none"))
    elif parameters.get("type", "object") != "object":
        bad.append(_bad(f"{field}.function.parameters.type", '"object"', "is something else"))
    return Tool(str(name), description, parameters, strict) if len(bad) == errors else None


def _check_unique(tools: Sequence[Tool | None], bad: list[FieldError]) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool is not None and tool.name in seen:
            bad.append(_bad(f"tools[{index}].function.name", "unique among the tools", "is there twice"))
        if tool is not None:
            seen.add(tool.name)


def _bad(field: str, constraint: str, what: str) -> FieldError:
    return FieldError(field, constraint, f"{field} {what}; it must be {constraint}.")


def tools_as_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """Instructions for the system message of a model whose chat template does not tell it about tools.

    ``tools``: as :func:`read_tools` accepts them.
    """
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        "You may call functions to help with the request. These are the functions, one JSON object a line:\n"
        f"{functions}\n"
        "To call one, answer with its name and arguments as JSON between these tags, once for each call:\n"
        '<tool_call>\n{"name": "the function\'s name", "arguments": {"argument": "value"}}\n</tool_call>'
    )
