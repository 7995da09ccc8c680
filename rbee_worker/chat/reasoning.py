"""Separates reasoning and content in text that arrives in pieces."""

from typing import Literal

from rbee_worker.chat.markers import MarkerFinder
from rbee_worker.chat.styles import ReasoningMarkers

Part = tuple[Literal["reasoning", "content"], str]
"""A piece of the answer, and which part it belongs to."""


class ReasoningSplitter:
    """Splits an answer into reasoning, which comes first, and content.

    The markers and the white space around the reasoning belong to neither. A marker later in the answer is content,
    because an answer may be about markers.

    Args:
        markers: the markers around the reasoning.
        opened: whether the prompt already ends with the opening marker.
    """

    def __init__(self, markers: ReasoningMarkers, *, opened: bool) -> None:
        self._state: Literal["start", "reasoning", "gap", "answer", "content"] = "start"
        self._opened = opened
        self._markers = markers
        self._open = MarkerFinder([markers.opens])
        self._close = MarkerFinder([markers.closes])
        begins, ends = markers.answer or ("", "")
        self._answer_begins = MarkerFinder([begins] if begins else [])
        self._answer_ends = MarkerFinder([ends] if ends else [])
        self._told = False
        self._held: list[str] = []
        self._text = ""

    def push(self, text: str) -> list[Part]:
        """The parts that ``text`` adds, in order."""
        self._text += text
        parts: list[Part] = []
        while self._text and self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The parts that were held. Call it when the answer has ended."""
        text, self._text = self._text, ""
        match self._state:
            case "start":
                kind: Literal["reasoning", "content"] = "reasoning" if self._opened else "content"
                return [(kind, "".join(self._held) + text)] if text or not self._opened else []
            case "reasoning":
                parts: list[Part] = []
                self._reason(text, parts)
                return parts
        return [("content", text)]

    def _step(self, parts: list[Part]) -> bool:
        """Read a part of the text. Returns whether there may be more to read."""
        match self._state:
            case "start":
                return self._step_start()
            case "reasoning":
                return self._step_reasoning(parts)
            case "gap":
                return self._step_gap()
            case "answer":
                return self._step_answer(parts)
        parts.append(("content", "".join(self._held) + self._text))
        self._held.clear()
        self._text = ""
        return False

    def _skip_space(self) -> str:
        """Remove white space from the beginning of the text, and return it."""
        rest = self._text.lstrip()
        space = self._text[: len(self._text) - len(rest)]
        self._text = rest
        return space

    def _step_start(self) -> bool:
        self._held.append(self._skip_space())
        if self._open.starting(self._text, 0):
            self._text = self._text.removeprefix(self._markers.opens)
            self._opened = True
        elif not self._text or self._open.may_start(self._text, 0):
            return False
        self._state = "reasoning" if self._opened else "content"
        if self._opened:
            self._held.clear()
        return True

    def _step_reasoning(self, parts: list[Part]) -> bool:
        found = self._close.find(self._text)
        if found is None:
            held = self._close.held(self._text)
            self._reason(self._text[:held], parts)
            self._text = self._text[held:]
            return False
        self._reason(self._text[: found[0]], parts)
        self._text = self._text[found[1] :]
        self._held.clear()
        self._state = "gap"
        return True

    def _reason(self, text: str, parts: list[Part]) -> None:
        """Emit reasoning. White space at its end is held until more reasoning follows."""
        solid = text.rstrip()
        if solid:
            if not self._told:
                self._held.clear()
                solid = solid.lstrip()
            parts.append(("reasoning", "".join(self._held) + solid))
            self._told = True
            self._held.clear()
        self._held.append(text[len(text.rstrip()) :])

    def _step_gap(self) -> bool:
        self._skip_space()
        if not self._text or self._answer_begins.may_start(self._text, 0):
            return False
        marker = self._answer_begins.starting(self._text, 0)
        self._text = self._text.removeprefix(marker or "")
        self._state = "answer" if marker else "content"
        return True

    def _step_answer(self, parts: list[Part]) -> bool:
        """Read content up to the marker that ends the answer."""
        found = self._answer_ends.find(self._text)
        held = self._answer_ends.held(self._text)
        parts.append(("content", self._text[: found[0] if found else held]))
        self._text = self._text[found[1] if found else held :]
        self._state = "content" if found else "answer"
        return found is not None
