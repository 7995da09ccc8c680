"""ChatFormat: how a model marks the parts of its answers. OutputParser: splits an answer into these parts."""

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
"""Markers that are special tokens in most tokenizers, so that decoded text leaves them out by default."""


class OutputParser:
    """Splits one answer while its text arrives.

    The deltas, joined, are the same however the text is cut into pieces. Markers of reasoning and calls are not
    emitted, not even in part. What is neither reasoning nor a call is content. No other character is lost or emitted
    twice, except white space and separators around reasoning and calls.
    """

    def __init__(self, reasoning: ReasoningSplitter | None, calls: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._calls = calls

    @property
    def tool_calls(self) -> int:
        """How many tool calls have begun."""
        return self._calls.count if self._calls else 0

    def push(self, text: str) -> list[Delta]:
        """The deltas that ``text`` adds to the answer."""
        out = DeltaList()
        self._tell(self._reasoning.push(text) if self._reasoning else [("content", text)], out)
        return out.take()

    def finish(self) -> list[Delta]:
        """The deltas of the text that was held. Call it when the answer has ended."""
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
        reasoning: the markers around its reasoning; None: it does not reason, or its markers are not known.
        tool_style: how it writes tool calls; None: not known. Then :attr:`calls_style` is used.
        takes_tools: whether its chat template tells the model about tools. For other models, see
            :func:`~rbee_worker.chat.tools.tools_as_text`.
        added_tokens: text -> id of the tokenizer's added tokens.
        special_tokens: the texts of the special ones among them; None: not known.
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
        """Detect the format from the markers in a chat template.

        Args:
            template_source: the text of the template; None: the model has no chat template.
            added_tokens: text -> id of the tokenizer's added tokens, special or not. A grammar allows a marker among
                them as one token.
            special_tokens: the texts of the special ones among them. None: markers that usually are special count as
                special.
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
        """The style by which calls are parsed and forced: the model's, or that of Hermes where it is not known."""
        return self.tool_style or HERMES

    @property
    def keeps_special_tokens(self) -> bool:
        """Whether a marker is a special token. Then requests need ``skip_special_tokens=False``."""
        markers = set(self.tool_style.markers if self.tool_style else ())
        if self.reasoning:
            markers |= {self.reasoning.opens, self.reasoning.closes}
        return not markers.isdisjoint(_USUALLY_SPECIAL if self.special_tokens is None else self.special_tokens)

    def opens_reasoning(self, prompt_text: str) -> bool:
        """Whether an answer to this prompt begins with reasoning, because the prompt ends with the opening marker."""
        return self.reasoning is not None and prompt_text.rstrip().endswith(self.reasoning.opens)

    def parser(self, prompt_text: str, *, tools: bool, tool_names: Collection[str] = ()) -> OutputParser:
        """A parser for one answer.

        Args:
            prompt_text: the rendered prompt.
            tools: whether to look for tool calls.
            tool_names: the functions that may be called. A call without a marker must have one of these names.
        """
        splitter = None
        if self.reasoning:
            splitter = ReasoningSplitter(self.reasoning, opened=self.opens_reasoning(prompt_text))
        return OutputParser(splitter, ToolCallParser(self.calls_style, tool_names) if tools else None)

    def tool_grammar(
        self, tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool, *, prompt_text: str = ""
    ) -> GrammarSpec:
        """A grammar whose texts are calls of tools in the style that :meth:`parser` reads.

        Args:
            tools: as OpenAI's ``tools``.
            choice: ``required``: any of the tools; else the name of the only one to call.
            parallel: whether several calls are allowed, instead of exactly one.
            prompt_text: the rendered prompt. If it begins reasoning, the calls follow after the reasoning.

        Raises:
            InvalidRequest: a tool is not valid, ``choice`` names none of them, or the grammar is too large.
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
