"""The events of a response's stream, and their frames.

As OpenAI sends them, and as the Open Responses specification asks: each frame has an ``event:`` line, which repeats the
``type`` in its data, and the last frame is ``[DONE]``.
"""

import itertools
from collections.abc import Sequence
from typing import Final, Literal, Protocol

from typing_extensions import TypedDict

from rbee_worker.chat.output import ContentDelta
from rbee_worker.errors import InvalidRequest, QueueFull, RbeeError
from rbee_worker.events import Event, Started, TokenLogprob
from rbee_worker.server.http.envelope import OPENAI_CODES, ErrorDetail, envelope
from rbee_worker.server.openai.answers import UsedTokens
from rbee_worker.server.openai.conversation import ChatStep
from rbee_worker.server.openai.logprobs import ChatTokenLogprob, chat_logprobs
from rbee_worker.server.openai.responses.items import (
    ItemEvent,
    ItemStatus,
    ItemWriter,
    MessageWriter,
    ReasoningWriter,
    ResponseArgumentsDeltaEvent,
    ResponseArgumentsDoneEvent,
    ResponseItemEvent,
    ResponsePartEvent,
    ResponseReasoningDeltaEvent,
    ResponseReasoningDoneEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    new_item,
    text_of,
)
from rbee_worker.server.openai.responses.object import ResponseError, ResponseObject, ResponseWriter, usage_of
from rbee_worker.server.openai.streams import Chunks, LastChunks, to_json

_FAILURES: Final[tuple[tuple[type[RbeeError], str], ...]] = (
    (InvalidRequest, "invalid_prompt"),
    (QueueFull, "rate_limit_exceeded"),
)
"""``response.error.code`` of errors that are not the server's; OpenAI has a closed list of them."""

Stage = Literal[
    "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
]


class ResponseStageEvent(TypedDict):
    """How far the response is; the last three end the stream."""

    type: Stage
    sequence_number: int
    response: ResponseObject


class ResponseErrorEvent(TypedDict):
    """The stream fails."""

    type: Literal["error"]
    sequence_number: int
    code: str
    message: str
    param: str | None
    error: ErrorDetail


ResponseEvent = ResponseStageEvent | ItemEvent | ResponseErrorEvent

RESPONSE_EVENTS: Final = (
    ResponseStageEvent,
    ResponseItemEvent,
    ResponsePartEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    ResponseReasoningDeltaEvent,
    ResponseReasoningDoneEvent,
    ResponseArgumentsDeltaEvent,
    ResponseArgumentsDoneEvent,
    ResponseErrorEvent,
)
"""What may come in the stream of a response."""


class Counter(Protocol):
    """Counts the tokens of a text."""

    def __call__(self, text: str, /) -> int:
        """How many tokens ``text`` is."""


class ResponseEvents:
    """Writes the steps of a reply as the events of a stream.

    Args:
        usage: of the reply; it is read when the reply has ended.
        response: writes the response.
        model: what it is called in answers.
        count: tokens of the reasoning.
    """

    def __init__(self, usage: UsedTokens, response: ResponseWriter, model: str, count: Counter) -> None:
        self._usage = usage
        self._response = response
        self._model = model
        self._count = count
        self._items: list[ItemWriter] = []
        self._open: ItemWriter | None = None
        self._numbers = itertools.count()

    def __call__(self, step: ChatStep) -> list[ResponseEvent]:
        """The events of one step."""
        told: list[ResponseEvent] = []
        if isinstance(step.event, Started):
            begun = self._response.write(self._model, "in_progress")
            told = [self._stage("response.created", begun), self._stage("response.in_progress", begun)]
        logprobs = _of_text(step)
        for delta in step.deltas:
            if self._open is None or not self._open.continues(delta):
                told += self._ended("completed")
                told += self._begun(new_item(len(self._items), self._numbers, delta))
            if self._open is not None:
                told += self._open.add(text_of(delta), logprobs if isinstance(delta, ContentDelta) else ())
            if isinstance(delta, ContentDelta):
                logprobs = []
        if step.finish_reason is not None:
            told += self._finished(cut=step.finish_reason == "length")
        return told

    def _begun(self, item: ItemWriter) -> list[ItemEvent]:
        self._open = item
        self._items.append(item)
        return item.begun()

    def _ended(self, status: ItemStatus) -> list[ItemEvent]:
        ended, self._open = self._open, None
        return ended.ended(status) if ended is not None else []

    def _finished(self, *, cut: bool) -> list[ResponseEvent]:
        status: Literal["incomplete", "completed"] = "incomplete" if cut else "completed"
        told: list[ResponseEvent] = [*self._ended(status)]
        if not cut and all(isinstance(item, ReasoningWriter) for item in self._items):
            # An answer without a word is an answer.
            told += self._begun(MessageWriter(len(self._items), self._numbers))
            told += self._ended(status)
        thought = sum(self._count(item.text) for item in self._items if isinstance(item, ReasoningWriter))
        output = [item.write() for item in self._items]
        whole = self._response.write(self._model, status, output, usage=usage_of(self._usage, thought))
        return [*told, self._stage("response.incomplete" if cut else "response.completed", whole)]

    def _stage(self, stage: Stage, response: ResponseObject) -> ResponseStageEvent:
        return {"type": stage, "sequence_number": next(self._numbers), "response": response}


def _of_text(step: ChatStep) -> list[ChatTokenLogprob]:
    """The log-probabilities of the tokens that make the text, without those of markers and of other items."""
    text = "".join(delta.text for delta in step.deltas if isinstance(delta, ContentDelta)).encode()
    if not step.logprobs or not text:
        return []
    return chat_logprobs(_overlapping(step.logprobs, text))["content"]


def _overlapping(tokens: Sequence[TokenLogprob], text: bytes) -> Sequence[TokenLogprob]:
    """Those of ``tokens`` of which a part is in ``text``, where that is found; else all."""
    begin = b"".join(bytes(token.bytes) for token in tokens).rfind(text)
    if begin < 0:
        return tokens  # the text begins with what an earlier token left of a character
    end, at, found = begin + len(text), 0, []
    for token in tokens:
        if at < end and at + len(token.bytes) > begin:
            found.append(token)
        at += len(token.bytes)
    return found


def failed(response: ResponseWriter, model: str, error: RbeeError, last: Event | None) -> LastChunks:
    """The last events of a stream that fails: ``error``, and ``response.failed`` where there is a response by then.

    ``error`` says what is wrong twice: as OpenAI's schema has it, and in the object that it sends and that makes its
    clients raise.
    """
    number = last.objects[-1]["sequence_number"] + 1 if isinstance(last, Chunks) else 0
    told = envelope(error, OPENAI_CODES)["error"]
    why: ResponseErrorEvent = {
        "type": "error",
        "sequence_number": number,
        "code": told["code"],
        "message": told["message"],
        "param": told["param"],
        "error": told,
    }
    if not number:
        return LastChunks(objects=(why,))
    code = next((code for kind, code in _FAILURES if isinstance(error, kind)), "server_error")
    problem: ResponseError = {"code": code, "message": told["message"]}
    end: ResponseStageEvent = {
        "type": "response.failed",
        "sequence_number": number + 1,
        "response": response.write(model, "failed", error=problem),
    }
    return LastChunks(objects=(why, end))


def encode_events(event: Event) -> bytes:
    """The frames of :class:`~rbee_worker.server.openai.streams.Chunks`, each with its ``event:`` line."""
    objects = event.objects if isinstance(event, Chunks) else ()
    return b"".join(b"event: %b\ndata: %b\n\n" % (item["type"].encode(), to_json(item)) for item in objects)
