"""The events of a response's stream, and their frames.

As OpenAI sends them, and as the Open Responses specification asks: each frame has an ``event:`` line, which repeats the
``type`` in its data, and the last frame is ``[DONE]``.
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

from rbee_worker.chat.output import ContentDelta
from rbee_worker.errors import InvalidRequest, QueueFull, RbeeError
from rbee_worker.events import Event, Started, TokenLogprob
from rbee_worker.server.http.envelope import OPENAI_CODES, envelope
from rbee_worker.server.openai.answers import Usage
from rbee_worker.server.openai.conversation import ChatStep
from rbee_worker.server.openai.logprobs import chat_logprobs
from rbee_worker.server.openai.responses.items import (
    ItemStatus,
    MessageOutput,
    OutputItem,
    ReasoningOutput,
    Told,
    new_item,
    text_of,
)
from rbee_worker.server.openai.responses.object import ResponseObject, usage_of
from rbee_worker.server.openai.streams import Chunks, LastChunks, to_json

_FAILURES: Final[tuple[tuple[type[RbeeError], str], ...]] = (
    (InvalidRequest, "invalid_prompt"),
    (QueueFull, "rate_limit_exceeded"),
)
"""``response.error.code`` of errors that are not the server's; OpenAI has a closed list of them."""


class Counter(Protocol):
    """Counts the tokens of a text."""

    def __call__(self, text: str, /) -> int:
        """How many tokens ``text`` is."""


class ResponseEvents:
    """Writes the steps of a reply as the events of a stream.

    Args:
        usage: of the reply; it is read when the reply has ended.
        response: what is known of the response.
        model: what it is called in answers.
        count: tokens of the reasoning.
    """

    def __init__(self, usage: Usage, response: ResponseObject, model: str, count: Counter) -> None:
        self._usage = usage
        self._response = response
        self._model = model
        self._count = count
        self._items: list[OutputItem] = []
        self._open: OutputItem | None = None
        self._number = 0

    def __call__(self, step: ChatStep) -> list[dict[str, Any]]:
        """The events of one step."""
        told: list[Told] = []
        if isinstance(step.event, Started):
            begun = self._response.to_dict(self._model, "in_progress")
            told = [("response.created", {"response": begun}), ("response.in_progress", {"response": begun})]
        logprobs = _of_text(step)
        for delta in step.deltas:
            if self._open is None or not self._open.continues(delta):
                told += self._ended("completed")
                told += self._begun(new_item(len(self._items), delta))
            if self._open is not None:
                told += self._open.add(text_of(delta), logprobs if isinstance(delta, ContentDelta) else ())
            if isinstance(delta, ContentDelta):
                logprobs = []
        if step.finish_reason is not None:
            told += self._finished(cut=step.finish_reason == "length")
        return [self._numbered(kind, fields) for kind, fields in told]

    def _begun(self, item: OutputItem) -> list[Told]:
        self._open = item
        self._items.append(item)
        return item.begun()

    def _ended(self, status: ItemStatus) -> list[Told]:
        ended, self._open = self._open, None
        return ended.ended(status) if ended is not None else []

    def _finished(self, *, cut: bool) -> list[Told]:
        status: ItemStatus = "incomplete" if cut else "completed"
        told = self._ended(status)
        if not cut and all(isinstance(item, ReasoningOutput) for item in self._items):
            # An answer without a word is an answer.
            told += self._begun(MessageOutput(len(self._items)))
            told += self._ended(status)
        thought = sum(self._count(item.text) for item in self._items if isinstance(item, ReasoningOutput))
        output = [item.to_dict() for item in self._items]
        usage = usage_of(self._usage, thought)
        response = self._response.to_dict(self._model, "incomplete" if cut else "completed", output, usage=usage)
        return [*told, (f"response.{status}", {"response": response})]

    def _numbered(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number} | fields


def _of_text(step: ChatStep) -> list[Any]:
    """The log-probabilities of the tokens that make the text, without those of markers and of other items."""
    text = "".join(delta.text for delta in step.deltas if isinstance(delta, ContentDelta)).encode()
    if not step.logprobs or not text:
        return []
    return list(chat_logprobs(_overlapping(step.logprobs, text))["content"])


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


def failed(response: ResponseObject, model: str, error: RbeeError, last: Event | None) -> LastChunks:
    """The last events of a stream that fails: ``error``, and ``response.failed`` where there is a response by then.

    ``error`` says what is wrong twice: as OpenAI's schema has it, and in the object that it sends and that makes its
    clients raise.
    """
    number = last.objects[-1]["sequence_number"] + 1 if isinstance(last, Chunks) else 0
    told = envelope(error, OPENAI_CODES)["error"]
    flat = {key: told[key] for key in ("code", "message", "param")}
    events = [{"type": "error", "sequence_number": number} | flat | {"error": told}]
    if number:
        code = next((code for kind, code in _FAILURES if isinstance(error, kind)), "server_error")
        why = {"code": code, "message": told["message"]}
        whole = response.to_dict(model, "failed", error=why)
        events.append({"type": "response.failed", "sequence_number": number + 1, "response": whole})
    return LastChunks(objects=tuple(events))


def encode_events(event: Event) -> bytes:
    """The frames of :class:`~rbee_worker.server.openai.streams.Chunks`, each with its ``event:`` line."""
    objects = event.objects if isinstance(event, Chunks) else ()
    return b"".join(b"event: %b\ndata: %b\n\n" % (item["type"].encode(), to_json(item)) for item in objects)
