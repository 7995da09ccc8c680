"""Deltas: the pieces of an answer, in the order in which they were generated."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a tool call: first its id and name, then its arguments piece by piece.

    Attributes:
        index: which call of the answer, from 0.
        id: of the call; only in its first delta.
        name: of the function; only in its first delta.
        arguments: the next piece of the arguments' JSON text, as the model writes it; empty in the first delta.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Delta = ContentDelta | ReasoningDelta | ToolCallDelta


class DeltaList:
    """Collects deltas. A delta that continues the one before it is merged into it."""

    __slots__ = ("_deltas",)

    def __init__(self) -> None:
        self._deltas: list[tuple[Delta, list[str]]] = []

    def content(self, text: str) -> None:
        self._add(ContentDelta(""), text)

    def reasoning(self, text: str) -> None:
        self._add(ReasoningDelta(""), text)

    def arguments(self, index: int, text: str) -> None:
        self._add(ToolCallDelta(index), text)

    def call(self, index: int, call_id: str, name: str) -> None:
        self._deltas.append((ToolCallDelta(index, call_id, name), []))

    def extend(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            match delta:
                case ContentDelta(text):
                    self.content(text)
                case ReasoningDelta(text):
                    self.reasoning(text)
                case ToolCallDelta():
                    self._deltas.append((delta, []))

    def take(self) -> list[Delta]:
        """The deltas since the last call of this method."""
        taken, self._deltas = self._deltas, []
        return [_filled(delta, "".join(pieces)) for delta, pieces in taken]

    def _add(self, empty: Delta, text: str) -> None:
        if not text:
            return
        if self._deltas and self._deltas[-1][0] == empty:
            self._deltas[-1][1].append(text)
        else:
            self._deltas.append((empty, [text]))


def _filled(delta: Delta, text: str) -> Delta:
    match delta:
        case ContentDelta():
            return ContentDelta(text)
        case ReasoningDelta():
            return ReasoningDelta(text)
        case ToolCallDelta(index, call_id, name, arguments):
            return ToolCallDelta(index, call_id, name, arguments + text)
