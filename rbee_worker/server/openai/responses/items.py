"""The items of a response as they grow: what each is, and the events that tell of it."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from rbee_worker.chat.output import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Told = tuple[str, dict[str, Any]]
"""An event: its type and what it says, without its number."""


class OutputItem(ABC):
    """One item of the output.

    Args:
        output_index: its place in the output.
    """

    prefix: ClassVar[str]

    def __init__(self, output_index: int) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self._index = output_index
        self._pieces: list[str] = []
        self._status: ItemStatus = "in_progress"

    @property
    def text(self) -> str:
        """What it says so far."""
        return "".join(self._pieces)

    def begun(self) -> list[Told]:
        """That it is there."""
        return [("response.output_item.added", {"output_index": self._index, "item": self.to_dict()})]

    def add(self, text: str, logprobs: Sequence[Any] = ()) -> list[Told]:
        """That it goes on with ``text``."""
        if not text:
            return []
        self._pieces.append(text)
        return [self._grown(text, logprobs)]

    def ended(self, status: ItemStatus) -> list[Told]:
        """That it is whole, or will not be."""
        self._status = status
        return [*self._last(), ("response.output_item.done", {"output_index": self._index, "item": self.to_dict()})]

    @abstractmethod
    def continues(self, delta: Delta) -> bool:
        """Whether ``delta`` is more of this item."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The item; while it grows, without what it says."""

    @abstractmethod
    def _grown(self, text: str, logprobs: Sequence[Any]) -> Told: ...

    @abstractmethod
    def _last(self) -> list[Told]: ...

    def _here(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self._index}


class _PartItem(OutputItem):
    """An item with one part of content."""

    word: ClassVar[str]

    def begun(self) -> list[Told]:
        return [*super().begun(), ("response.content_part.added", self._here() | {"part": self._part("")})]

    def _content(self) -> list[dict[str, Any]]:
        return [] if self._status == "in_progress" else [self._part(self.text)]

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": self.word, "text": text}

    def _grown(self, text: str, _logprobs: Sequence[Any]) -> Told:
        return f"response.{self.word}.delta", self._here() | {"delta": text}

    def _last(self) -> list[Told]:
        text = self.text
        done = self._here() | {"text": text}
        part = self._here() | {"part": self._part(text)}
        return [(f"response.{self.word}.done", done), ("response.content_part.done", part)]

    def _here(self) -> dict[str, Any]:
        return super()._here() | {"content_index": 0}


class ReasoningOutput(_PartItem):
    """What the model thinks before it answers."""

    prefix = "rs"
    word = "reasoning_text"

    def continues(self, delta: Delta) -> bool:
        return isinstance(delta, ReasoningDelta)

    def to_dict(self) -> dict[str, Any]:
        told = {"id": self.id, "type": "reasoning", "status": self._status}
        return told | {"summary": [], "content": self._content()}


class MessageOutput(_PartItem):
    """The answer itself."""

    prefix = "msg"
    word = "output_text"

    def __init__(self, output_index: int) -> None:
        super().__init__(output_index)
        self._logprobs: list[Any] = []

    def continues(self, delta: Delta) -> bool:
        return isinstance(delta, ContentDelta)

    def to_dict(self) -> dict[str, Any]:
        told = {"id": self.id, "type": "message", "status": self._status}
        return told | {"role": "assistant", "content": self._content()}

    def _part(self, text: str) -> dict[str, Any]:
        return super()._part(text) | {"annotations": [], "logprobs": list(self._logprobs)}

    def _grown(self, text: str, logprobs: Sequence[Any]) -> Told:
        self._logprobs += logprobs
        kind, told = super()._grown(text, logprobs)
        return kind, told | {"logprobs": list(logprobs)}

    def _last(self) -> list[Told]:
        (kind, done), *rest = super()._last()
        return [(kind, done | {"logprobs": list(self._logprobs)}), *rest]


class CallOutput(OutputItem):
    """A call of a function."""

    prefix = "fc"

    def __init__(self, output_index: int, first: ToolCallDelta) -> None:
        super().__init__(output_index)
        self._call = first

    def continues(self, delta: Delta) -> bool:
        return isinstance(delta, ToolCallDelta) and delta.index == self._call.index

    def to_dict(self) -> dict[str, Any]:
        arguments = "" if self._status == "in_progress" else self.text
        told = {"id": self.id, "type": "function_call", "status": self._status, "call_id": self._call.id}
        return told | {"name": self._call.name, "arguments": arguments}

    def _grown(self, text: str, _logprobs: Sequence[Any]) -> Told:
        return "response.function_call_arguments.delta", self._here() | {"delta": text}

    def _last(self) -> list[Told]:
        done = self._here() | {"name": self._call.name, "arguments": self.text}
        return [("response.function_call_arguments.done", done)]


def new_item(output_index: int, delta: Delta) -> OutputItem:
    """The item that begins with ``delta``."""
    match delta:
        case ReasoningDelta():
            return ReasoningOutput(output_index)
        case ContentDelta():
            return MessageOutput(output_index)
        case ToolCallDelta():
            return CallOutput(output_index, delta)


def text_of(delta: Delta) -> str:
    """What ``delta`` adds to its item."""
    return delta.arguments if isinstance(delta, ToolCallDelta) else delta.text
