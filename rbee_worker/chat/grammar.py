"""Grammars that force a model to call tools, in llguidance's dialect of Lark."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rbee_worker.chat.styles import ToolStyle
from rbee_worker.chat.tools import Tool
from rbee_worker.config import JSON_LAYOUT, MAX_GRAMMAR_BYTES, GrammarSpec
from rbee_worker.errors import FieldError, InvalidRequest

MAX_PARALLEL_CALLS = 16
"""Forced calls in one answer. Without this limit a model might never stop."""


_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "readOnly", "$comment"})
_SCHEMA_KEYS = frozenset({"items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"})
_SCHEMA_LIST_KEYS = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
_SCHEMA_MAP_KEYS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})

_COMBINING = frozenset(
    {"additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if"}
)


def forced_calls(
    tools: Sequence[Tool],
    choice: str,
    *,
    style: ToolStyle,
    parallel: bool,
    reasoning_closes: str | None,
    added_tokens: Mapping[str, int],
) -> GrammarSpec:
    """A grammar whose texts are calls of tools.

    Args:
        tools: the tools that may be called.
        choice: ``required``: any of the tools; else the name of the only one to call.
        style: how calls are written.
        parallel: whether up to :data:`MAX_PARALLEL_CALLS` calls are allowed, instead of exactly one.
        reasoning_closes: the text begins with reasoning, and this marker ends it. None: it begins with a call.
        added_tokens: text -> id of the tokenizer's added tokens. A marker among them may be generated as that token or
            as plain text.

    Raises:
        InvalidRequest: no tool has the name, or the schemas are too large or nested too deeply.
    """
    chosen = [tool for tool in tools if choice in ("required", tool.name)]
    if not chosen:
        message = "tool_choice names a function that is not among the tools."
        raise InvalidRequest(message, fields=[FieldError("tool_choice", "the name of one of the tools", message)])
    writer = _Writer(style.markers, added_tokens)
    calls = ["call", *([f"({writer.text(style.between)} call){{0,{MAX_PARALLEL_CALLS - 1}}}"] if parallel else [])]
    parts = [writer.text(style.begin), *calls, writer.text(style.end)]
    rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(chosen)))}"]
    try:
        rules += [f"call_{index}: {writer.call(style.call, tool)}" for index, tool in enumerate(chosen)]
    except RecursionError:
        raise _too_large("is nested too deeply", "less deeply nested") from None
    if reasoning_closes is not None:
        parts.insert(0, "reasoning")
        rules += writer.reasoning(reasoning_closes)
    text = "\n".join([f"start: {' '.join(part for part in parts if part)}", *rules, ""])
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise _too_large(f"makes a grammar of {len(text.encode())} bytes", f"at most {MAX_GRAMMAR_BYTES}")
    return GrammarSpec("lark", text)


def _too_large(what: str, constraint: str) -> InvalidRequest:
    message = f"tools {what}; for calls to be forced it must be {constraint}."
    hint = 'Send fewer tools, name one in tool_choice, or leave tool_choice at "auto".'
    return InvalidRequest(message, fields=[FieldError("tools", constraint, message)], hint=hint)


class _Writer:
    """Writes text as Lark. Markers that are tokens may be generated as tokens."""

    def __init__(self, markers: Sequence[str], added_tokens: Mapping[str, int]) -> None:
        self._tokens = added_tokens
        self._markers = re.compile("(" + "|".join(map(re.escape, markers)) + ")")

    def text(self, text: str) -> str:
        """Lark for a fixed text; empty for an empty text."""
        return " ".join(self.marker(part) for part in self._markers.split(text) if part)

    def marker(self, text: str) -> str:
        """Lark for a text that may be one token.

        The token is named by its id, ``<[5]>``. That works for special and plain tokens, and for every text.
        """
        literal = json.dumps(text)
        return f"(<[{self._tokens[text]}]> | {literal})" if text in self._tokens else literal

    def call(self, template: str, tool: Tool) -> str:
        head, tail = template.replace("$name", tool.name).split("$arguments")
        schema = json.dumps(_arguments_schema(tool))
        return " ".join(part for part in (self.text(head), f"%json {schema}", self.text(tail)) if part)

    def reasoning(self, closes: str) -> list[str]:
        """Rules for any text up to a marker, and the line breaks that models write after it."""
        spelled = re.escape(closes).replace("/", r"\/")
        rules = ["reasoning: thought NEWLINES?", r"NEWLINES: /\n{1,2}/"]
        if closes not in self._tokens:
            return [*rules, f"thought[lazy]: /(?s:.*){spelled}/"]
        return [
            *rules,
            f"thought: TEXT <[{self._tokens[closes]}]> | spelled",
            "TEXT: /(?s:.*)/",
            f"spelled[lazy]: /(?s:.*){spelled}/",
        ]


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema by which the arguments of a call are generated.

    All that it allows, the tool's own schema allows too. If that lists properties and says nothing about others, this
    one forbids others, so that a model does not invent any.
    """
    schema: dict[str, Any] = {**_without_annotations(tool.parameters), "type": "object"}
    properties, required = schema.get("properties"), schema.get("required", [])
    if _lists_all(properties, required) and not _COMBINING & schema.keys():
        schema["additionalProperties"] = False
    return schema | {"x-guidance": {**JSON_LAYOUT, "lenient": not tool.strict}}


def _lists_all(properties: Any, required: Any) -> bool:
    """Whether a schema lists properties, and all that it requires are among them."""
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    return all(isinstance(name, str) and name in properties for name in required)


def _without_annotations(schema: Any) -> Any:
    """A JSON schema without annotations. They are only for readers, and may be most of its text."""
    if not isinstance(schema, Mapping):
        return schema
    pruned: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _SCHEMA_KEYS:
            pruned[key] = _without_annotations(value)
        elif key in _SCHEMA_LIST_KEYS and isinstance(value, list):
            pruned[key] = [_without_annotations(part) for part in value]
        elif key in _SCHEMA_MAP_KEYS and isinstance(value, Mapping):
            pruned[key] = {name: _without_annotations(part) for name, part in value.items()}
        elif key not in _ANNOTATIONS:
            pruned[key] = value
    return pruned
