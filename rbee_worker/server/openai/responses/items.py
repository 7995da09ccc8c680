"""The items of a response, and the events that are sent while they grow."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from typing_extensions import TypedDict

from rbee_worker.chat.output import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from rbee_worker.server.openai.logprobs import ChatTokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    """What a message says."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatTokenLogprob]


class OutputReasoningText(TypedDict):
    """What the model thought."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(TypedDict):
    """The answer itself."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(TypedDict):
    """What the model thinks before it answers; no summaries are made."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[OutputReasoningText]


class OutputCall(TypedDict):
    """A call of a function; its arguments are JSON text."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class ResponseItemEvent(TypedDict):
    """An item begins, or is whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class ResponsePartEvent(TypedDict):
    """A part of an item begins, or is whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText | OutputReasoningText


class ResponseTextDeltaEvent(TypedDict):
    """More of the answer."""

    type: Literal["response.output_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatTokenLogprob]


class ResponseTextDoneEvent(TypedDict):
    """The answer is whole."""

    type: Literal["response.output_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatTokenLogprob]


class ResponseReasoningDeltaEvent(TypedDict):
    """More of the reasoning."""

    type: Literal["response.reasoning_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str


class ResponseReasoningDoneEvent(TypedDict):
    """The reasoning is whole."""

    type: Literal["response.reasoning_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str


class ResponseArgumentsDeltaEvent(TypedDict):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ResponseArgumentsDoneEvent(TypedDict):
    """A call's arguments are whole."""

    type: Literal["response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


ItemEvent = (
    ResponseItemEvent
    | ResponsePartEvent
    | ResponseTextDeltaEvent
    | ResponseTextDoneEvent
    | ResponseReasoningDeltaEvent
    | ResponseReasoningDoneEvent
    | ResponseArgumentsDeltaEvent
    | ResponseArgumentsDoneEvent
)


class _Place(TypedDict):
    """The fields that the events of an item share, after the type."""

    sequence_number: int
    item_id: str
    output_index: int


class _PartPlace(_Place):
    """The same for the events of the item's only part."""

    content_index: int


class ItemWriter(ABC):
    """Writes one item of the output, and its events.

    Args:
        index: of the item in the output.
        numbers: gives the sequence numbers of events; shared by all items.

    Attributes:
        id: of the item.
    """

    prefix: ClassVar[str]

    def __init__(self, index: int, numbers: Iterator[int]) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self._index = index
        self._numbers = numbers
        self._pieces: list[str] = []
        self._status: ItemStatus = "in_progress"

    @property
    def text(self) -> str:
        """Its text so far; of a call, the arguments."""
        return "".join(self._pieces)

    def begun(self) -> list[ItemEvent]:
        """The events for its beginning."""
        return [self._item_event("response.output_item.added")]

    def add(self, text: str, logprobs: Sequence[ChatTokenLogprob] = ()) -> list[ItemEvent]:
        """Add text, and give the events for that."""
        if not text:
            return []
        self._pieces.append(text)
        return [self._grown(text, logprobs)]

    def ended(self, status: ItemStatus) -> list[ItemEvent]:
        """End it with a status, and give the events for that."""
        self._status = status
        return [*self._last(), self._item_event("response.output_item.done")]

    @abstractmethod
    def continues(self, delta: Delta) -> bool:
        """Whether ``delta`` belongs to this item."""

    @abstractmethod
    def write(self) -> OutputItem:
        """The item as it is sent. Before its end, the text is left out."""

    @abstractmethod
    def _grown(self, text: str, logprobs: Sequence[ChatTokenLogprob]) -> ItemEvent: ...

    @abstractmethod
    def _last(self) -> list[ItemEvent]: ...

    def _item_event(self, kind: Literal["response.output_item.added", "response.output_item.done"]) -> ItemEvent:
        number = next(self._numbers)
        return {"type": kind, "sequence_number": number, "output_index": self._index, "item": self.write()}

    def _place(self) -> _Place:
        return {"sequence_number": next(self._numbers), "item_id": self.id, "output_index": self._index}


class _PartWriter(ItemWriter):
    """Writes an item that has one part of content."""

    def begun(self) -> list[ItemEvent]:
        return [*super().begun(), self._part_event("response.content_part.added")]

    @abstractmethod
    def _part(self, text: str) -> OutputText | OutputReasoningText: ...

    @abstractmethod
    def _text_done(self) -> ItemEvent: ...

    def _last(self) -> list[ItemEvent]:
        return [self._text_done(), self._part_event("response.content_part.done")]

    def _part_place(self) -> _PartPlace:
        return {**self._place(), "content_index": 0}

    def _part_event(self, kind: Literal["response.content_part.added", "response.content_part.done"]) -> ItemEvent:
        return {
            "type": kind,
            **self._part_place(),
            "part": self._part("" if self._status == "in_progress" else self.text),
        }


class ReasoningWriter(_PartWriter):
    """Writes the reasoning before the answer."""

    prefix = "rs"

    def continues(self, delta: Delta) -> bool:
        return isinstance(delta, ReasoningDelta)

    def write(self) -> OutputReasoning:
        return {
            "id": self.id,
            "type": "reasoning",
            "status": self._status,
            "summary": [],
            "content": [] if self._status == "in_progress" else [self._part(self.text)],
        }

    def _part(self, text: str) -> OutputReasoningText:
        return {"type": "reasoning_text", "text": text}

    def _grown(self, text: str, _logprobs: Sequence[ChatTokenLogprob]) -> ResponseReasoningDeltaEvent:
        return {"type": "response.reasoning_text.delta", **self._part_place(), "delta": text}

    def _text_done(self) -> ResponseReasoningDoneEvent:
        return {"type": "response.reasoning_text.done", **self._part_place(), "text": self.text}


class MessageWriter(_PartWriter):
    """Writes the answer itself."""

    prefix = "msg"

    def __init__(self, index: int, numbers: Iterator[int]) -> None:
        super().__init__(index, numbers)
        self._logprobs: list[ChatTokenLogprob] = []

    def continues(self, delta: Delta) -> bool:
        return isinstance(delta, ContentDelta)

    def write(self) -> OutputMessage:
        return {
            "id": self.id,
            "type": "message",
            "status": self._status,
            "role": "assistant",
            "content": [] if self._status == "in_progress" else [self._part(self.text)],
        }

    def _part(self, text: str) -> OutputText:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}

    def _grown(self, text: str, logprobs: Sequence[ChatTokenLogprob]) -> ResponseTextDeltaEvent:
        self._logprobs += logprobs
        return {"type": "response.output_text.delta", **self._part_place(), "delta": text, "logprobs": list(logprobs)}

    def _text_done(self) -> ResponseTextDoneEvent:
        return {
            "type": "response.output_text.done",
            **self._part_place(),
            "text": self.text,
            "logprobs": list(self._logprobs),
        }


class CallWriter(ItemWriter):
    """Writes a call of a function. ``first`` has the id and the name of the call."""

    prefix = "fc"

    def __init__(self, index: int, numbers: Iterator[int], first: ToolCallDelta) -> None:
        super().__init__(index, numbers)
        self._call = first.index
        self._call_id = first.id or ""
        self._name = first.name or ""

    def continues(self, delta: Delta) -> bool:
        return isinstance(delta, ToolCallDelta) and delta.index == self._call

    def write(self) -> OutputCall:
        return {
            "id": self.id,
            "type": "function_call",
            "status": self._status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "" if self._status == "in_progress" else self.text,
        }

    def _grown(self, text: str, _logprobs: Sequence[ChatTokenLogprob]) -> ResponseArgumentsDeltaEvent:
        return {"type": "response.function_call_arguments.delta", **self._place(), "delta": text}

    def _last(self) -> list[ItemEvent]:
        done: ResponseArgumentsDoneEvent = {
            "type": "response.function_call_arguments.done",
            **self._place(),
            "name": self._name,
            "arguments": self.text,
        }
        return [done]


def new_item(index: int, numbers: Iterator[int], first: Delta) -> ItemWriter:
    """A writer for the item that begins with ``first``."""
    match first:
        case ReasoningDelta():
            return ReasoningWriter(index, numbers)
        case ContentDelta():
            return MessageWriter(index, numbers)
        case ToolCallDelta():
            return CallWriter(index, numbers, first)


def text_of(delta: Delta) -> str:
    """The text that ``delta`` adds to its item; of a call, a piece of the arguments."""
    return delta.arguments if isinstance(delta, ToolCallDelta) else delta.text
