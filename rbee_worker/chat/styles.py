"""How model families mark reasoning and tool calls, and how to detect this from their chat templates."""

import re
from dataclasses import dataclass
from typing import Literal

StyleName = Literal["hermes", "granite", "llama3", "mistral", "mistral-named"]


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The markers around a model's reasoning.

    Attributes:
        opens, closes: the markers before and after the reasoning.
        answer: markers before and after the answer that follows, as Granite has them. The content leaves them out.
    """

    opens: str
    closes: str
    answer: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """One way to write tool calls.

    Attributes:
        opens: markers before a call, or before an array of calls.
        call: how a forced call is written, with ``$name`` and ``$arguments``.
        closes: markers after a call, or after an array of calls.
        bare: whether an answer may also begin with a call without a marker.
        named: whether the function's name may come before its arguments: ``name[ARGS]{…}``.
        separator: a character that may stand between two calls.
        begin, between, end: the text before, between and after forced calls.
    """

    name: StyleName
    opens: tuple[str, ...]
    call: str
    closes: tuple[str, ...] = ()
    bare: bool = False
    named: bool = False
    separator: str = ""
    begin: str = ""
    between: str = ""
    end: str = ""

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers. Each of them may be one token of the vocabulary."""
        return (*self.opens, *self.closes, *(("[ARGS]", "[CALL_ID]") if self.named else ()))


_JSON_CALL = '{"name": "$name", "arguments": $arguments}'

HERMES = ToolStyle(
    name="hermes",
    opens=("<tool_call>",),
    closes=("</tool_call>",),
    call=f"<tool_call>\n{_JSON_CALL}\n</tool_call>",
    between="\n",
)
GRANITE = ToolStyle(
    name="granite",
    opens=("<|tool_call|>", "<tool_call>"),
    closes=("</tool_call>",),
    call=_JSON_CALL,
    begin="<|tool_call|>[",
    between=", ",
    end="]",
)
LLAMA3 = ToolStyle(
    name="llama3",
    opens=("<|python_tag|>", "<|python_start|>"),
    closes=("<|python_end|>",),
    bare=True,
    separator=";",
    call='{"name": "$name", "parameters": $arguments}',
    between="; ",
)
MISTRAL = ToolStyle(
    name="mistral",
    opens=("[TOOL_CALLS]",),
    named=True,
    call=_JSON_CALL,
    begin="[TOOL_CALLS][",
    between=", ",
    end="]",
)
MISTRAL_NAMED = ToolStyle(
    name="mistral-named", opens=("[TOOL_CALLS]",), named=True, call="[TOOL_CALLS]$name[ARGS]$arguments"
)

_REASONING = (
    ReasoningMarkers("[THINK]", "[/THINK]"),
    ReasoningMarkers("<seed:think>", "</seed:think>"),
    ReasoningMarkers("<think>", "</think>", ("<response>", "</response>")),
    ReasoningMarkers("<think>", "</think>"),
    ReasoningMarkers("Here is my thought process:", "Here is my response:"),
)
_LLAMA_HINT = re.compile(r'<\|python_(?:tag|start)\|>|"name": function name')
_OTHER_USE_OF_TOOL_CALL = ("<function=", "<arg_key>")
"""In a template, one of these shows that it has something else than JSON between the markers of Hermes."""


def detect_reasoning(template: str) -> ReasoningMarkers | None:
    """The markers of reasoning in a chat template; None: it has none that are known."""
    for markers in _REASONING:
        named = (markers.opens, markers.closes)
        if markers.opens.startswith("Here"):
            found = all(marker in template for marker in named)
        else:
            found = any(marker in template for marker in named)
        if found and (markers.answer is None or markers.answer[0] in template):
            return markers
    return None


def detect_tools(template: str) -> ToolStyle | None:
    """The style of tool calls in a chat template; None: it has none that is known."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<|tool_call|>" in template:
        return GRANITE
    if "<tool_call>" in template:
        return None if any(hint in template for hint in _OTHER_USE_OF_TOOL_CALL) else HERMES
    return LLAMA3 if _LLAMA_HINT.search(template) else None
