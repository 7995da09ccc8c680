"""What a chat model writes, as OpenAI's clients expect it: reasoning, content and tool calls."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rbee_worker.chat.calls import ToolCallParser
from rbee_worker.chat.deltas import ContentDelta, Delta, DeltaList, ReasoningDelta, ToolCallDelta
from rbee_worker.chat.grammar import forced_calls
from rbee_worker.chat.reasoning import Part, ReasoningSplitter
from rbee_worker.chat.styles import HERMES, ReasoningMarkers, ToolStyle, detect_reasoning, detect_tools
from rbee_worker.chat.tools import read_tools
from rbee_worker.config import GrammarSpec

__all__ = ["ChatFormat", "ContentDelta", "Delta", "OutputParser", "ReasoningDelta", "ToolCallDelta"]

_TOOLS_VARIABLE = re.compile(r"\btools\b")
_USUALLY_SPECIAL = frozenset(
    {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "<|python_tag|>", "<|python_start|>"}
    | {"<|python_end|>", "<|tool_call|>"}
)
"""Markers that tokenizers skip when they leave special tokens out."""


class OutputParser:
    """Takes one answer apart, as its text arrives.

    However the text is cut into pieces, what the deltas say, put together, is the same. No marker is ever told in
    part, and no character is lost or told twice: what turns out not to be reasoning or a call is content.
    """

    def __init__(self, reasoning: ReasoningSplitter | None, calls: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._calls = calls

    @property
    def tool_calls(self) -> int:
        """Tool calls begun so far."""
        return self._calls.count if self._calls else 0

    def push(self, text: str) -> list[Delta]:
        """What ``text`` adds to the answer."""
        out = DeltaList()
        self._tell(self._reasoning.push(text) if self._reasoning else [("content", text)], out)
        return out.take()

    def finish(self) -> list[Delta]:
        """What was held back; the answer has ended."""
        out = DeltaList()
        self._tell(self._reasoning.finish() if self._reasoning else [], out)
        if self._calls:
            out.extend(self._calls.finish())
        return out.take()

    def _tell(self, parts: Sequence[Part], out: DeltaList) -> None:
        for kind, text in parts:
            if kind == "reasoning":
                out.reasoning(text)
            elif self._calls:
                out.extend(self._calls.push(text))
            else:
                out.content(text)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model marks the parts of its answers.

    Attributes:
        reasoning: what stands around its reasoning; None: it does not reason, or not in a known way.
        tool_style: how it writes tool calls; None: not in a known way, and :attr:`calls_style` is used for it.
        takes_tools: its chat template says what tools there are. For others, see
            :func:`~rbee_worker.chat.tools.tools_as_text`.
        added_tokens: ids of the tokenizer's added tokens by their text.
        special_tokens: those of them that are left out of text unless asked for; None: not known.
    """

    reasoning: ReasoningMarkers | None = None
    tool_style: ToolStyle | None = None
    takes_tools: bool = False
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    special_tokens: frozenset[str] | None = None

    @classmethod
    def detect(
        cls,
        template_source: str | None,
        *,
        added_tokens: Mapping[str, int] | None = None,
        special_tokens: Collection[str] | None = None,
    ) -> "ChatFormat":
        """Tell the format by a chat template's source, from the markers in it.

        Args:
            template_source: jinja2 text; None: the model has no chat template.
            added_tokens: ids of the tokenizer's added tokens by their text, special or not. With them grammars let
                a marker be one token, which it is for the model where there is such a token.
            special_tokens: those of them that are special. Without it, markers that usually are count as such.
        """
        source = template_source or ""
        return cls(
            reasoning=detect_reasoning(source),
            tool_style=detect_tools(source),
            takes_tools=_TOOLS_VARIABLE.search(source) is not None,
            added_tokens=dict(added_tokens or {}),
            special_tokens=None if special_tokens is None else frozenset(special_tokens),
        )

    @property
    def calls_style(self) -> ToolStyle:
        """How calls are parsed and forced: the model's style, or that of Hermes where it has none that is known."""
        return self.tool_style or HERMES

    @property
    def keeps_special_tokens(self) -> bool:
        """Whether a marker is a special token, so that requests need ``skip_special_tokens=False``."""
        markers = set(self.tool_style.markers if self.tool_style else ())
        if self.reasoning:
            markers |= {self.reasoning.opens, self.reasoning.closes}
        return not markers.isdisjoint(_USUALLY_SPECIAL if self.special_tokens is None else self.special_tokens)

    def opens_reasoning(self, prompt_text: str) -> bool:
        """Whether an answer to this prompt begins inside the reasoning, because the prompt ends with its marker."""
        return self.reasoning is not None and prompt_text.rstrip().endswith(self.reasoning.opens)

    def parser(self, prompt_text: str, *, tools: bool, tool_names: Collection[str] = ()) -> OutputParser:
        """A parser for one answer.

        Args:
            prompt_text: the rendered prompt that it answers.
            tools: whether tool calls are looked for.
            tool_names: functions that may be called. Text that is not marked as a call is one only with such a name.
        """
        splitter = None
        if self.reasoning:
            splitter = ReasoningSplitter(self.reasoning, opened=self.opens_reasoning(prompt_text))
        return OutputParser(splitter, ToolCallParser(self.calls_style, tool_names) if tools else None)

    def tool_grammar(
        self, tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool, *, prompt_text: str = ""
    ) -> GrammarSpec:
        """A grammar whose texts are calls of the tools, in the model's own style, that :meth:`parser` understands.

        Args:
            tools: as OpenAI's ``tools``.
            choice: ``required``: any of the tools; else the name of the one to call.
            parallel: allow several calls, instead of exactly one.
            prompt_text: the rendered prompt. Where it begins the reasoning, the calls follow behind the reasoning.

        Raises:
            InvalidRequest: a tool is not well defined, or ``choice`` is not among them.
        """
        closes = self.reasoning.closes if self.reasoning and self.opens_reasoning(prompt_text) else None
        return forced_calls(
            read_tools(tools),
            choice,
            style=self.calls_style,
            parallel=parallel,
            reasoning_closes=closes,
            added_tokens=self.added_tokens,
        )
