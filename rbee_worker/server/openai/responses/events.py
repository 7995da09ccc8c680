"""The events of a response's stream, and their frames.

They follow OpenAI and the Open Responses specification: each frame has an ``event:`` line, which repeats the ``type``
of its data, and the last frame is ``[DONE]``.
"""

import itertools
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Final, Literal

from typing_extensions import TypedDict

from rbee_worker.chat.output import ContentDelta
from rbee_worker.errors import InvalidRequest, QueueFull, RbeeError
from rbee_worker.events import Started, TokenLogprob
from rbee_worker.server.http.envelope import OPENAI_CODES, ErrorDetail, envelope
from rbee_worker.server.openai.conversation import ChatChoices, ChatPiece
from rbee_worker.server.openai.logprobs import ChatTokenLogprob, token_logprobs
from rbee_worker.server.openai.responses.body import ResponsesBody
from rbee_worker.server.openai.responses.items import (
    ItemEvent,
    ItemWriter,
    MessageWriter,
    OutputItem,
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
from rbee_worker.server.openai.responses.object import (
    ResponseError,
    ResponseObject,
    ResponseUsage,
    Status,
    response_object,
    usage_of,
)
from rbee_worker.server.sse import Frames, frame

_FAILURES: Final[tuple[tuple[type[RbeeError], str], ...]] = (
    (InvalidRequest, "invalid_prompt"),
    (QueueFull, "rate_limit_exceeded"),
)
"""Class of an error -> ``response.error.code``. All others have ``server_error``. OpenAI has a closed list of codes."""

Stage = Literal[
    "response.created",
    "response.in_progress",
    "response.completed",
    "response.incomplete",
    "response.failed",
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


ResponseEvent = ItemEvent | ResponseStageEvent | ResponseErrorEvent

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
"""The shapes of all events that the stream of a response may have."""


class ResponseWriter:
    """Writes one response, as a stream of events or as a whole.

    Args:
        body: the request.
        response_id: the id of the response, and of its job.
    """

    def __init__(self, body: ResponsesBody, response_id: str) -> None:
        self._body = body
        self._id = response_id
        self._created_at = int(time.time())
        self._model = ""
        self._numbers = itertools.count()

    async def frames(self, choices: ChatChoices, model: str) -> Frames:
        """The frames of a streamed response; see :meth:`events`."""
        async with aclosing(self.events(choices, model)) as events:
            async for event in events:
                yield frame(event, event["type"])

    async def whole(self, choices: ChatChoices, model: str) -> ResponseObject:
        """The response object of the last event; see :meth:`events`."""
        response = self._response("in_progress")
        async with aclosing(self.events(choices, model)) as events:
            async for event in events:
                if event["type"] == "response.completed" or event["type"] == "response.incomplete":
                    response = event["response"]
        return response

    async def events(self, choices: ChatChoices, model: str) -> AsyncGenerator[ResponseEvent, None]:
        """The events of a response, up to ``response.completed`` or ``response.incomplete``.

        Args:
            choices: must be a single choice.
            model: the name of the model in the answer.

        Raises:
            RbeeError: the answer failed. Then send :meth:`failed`.
        """
        self._model = model
        items: list[ItemWriter] = []  # only the last one still grows
        cut = False
        async with aclosing(choices.pieces()) as pieces:
            async for piece in pieces:
                if isinstance(piece.event, Started):
                    begun = self._response("in_progress")
                    yield self._stage("response.created", begun)
                    yield self._stage("response.in_progress", begun)
                for event in self._grown(items, piece):
                    yield event
                cut = piece.finish_reason == "length"
        for event in self._ended(items, "incomplete" if cut else "completed"):
            yield event
        thoughts = [item.text for item in items if isinstance(item, ReasoningWriter)]
        thought = sum(len(choices.tokenizer.encode(text, add_special_tokens=False)) for text in thoughts)
        output, usage = [item.write() for item in items], usage_of(choices.used, thought)
        response = self._response("incomplete" if cut else "completed", output, usage=usage)
        yield self._stage("response.incomplete" if cut else "response.completed", response)

    def failed(self, error: RbeeError) -> bytes:
        """The last frames of a stream that fails: ``error``; and ``response.failed``, if any event was sent before.

        ``error`` has the problem twice: in the fields of OpenAI's schema, and in an object, which makes OpenAI's
        clients raise.
        """
        number = next(self._numbers)
        told = envelope(error, OPENAI_CODES)["error"]
        event: ResponseErrorEvent = {
            "type": "error",
            "sequence_number": number,
            "code": told["code"],
            "message": told["message"],
            "param": told["param"],
            "error": told,
        }
        frames = frame(event, event["type"])
        if number:
            code = next((code for kind, code in _FAILURES if isinstance(error, kind)), "server_error")
            response = self._response("failed", error={"code": code, "message": told["message"]})
            last = self._stage("response.failed", response)
            frames += frame(last, last["type"])
        return frames

    def _grown(self, items: list[ItemWriter], piece: ChatPiece) -> Iterator[ItemEvent]:
        """Add a piece to the items, and give the events of that."""
        logprobs = _of_text(piece)
        for delta in piece.deltas:
            if not items or not items[-1].continues(delta):
                if items:
                    yield from items[-1].ended("completed")
                items.append(new_item(len(items), self._numbers, delta))
                yield from items[-1].begun()
            of_text = isinstance(delta, ContentDelta)
            yield from items[-1].add(text_of(delta), logprobs if of_text else ())
            logprobs = [] if of_text else logprobs

    def _ended(self, items: list[ItemWriter], status: Literal["completed", "incomplete"]) -> Iterator[ItemEvent]:
        """End the last item, and give the events of that."""
        if items:
            yield from items[-1].ended(status)
        if status == "completed" and all(isinstance(item, ReasoningWriter) for item in items):
            # An empty answer is a message too.
            items.append(MessageWriter(len(items), self._numbers))
            yield from items[-1].begun()
            yield from items[-1].ended(status)

    def _response(
        self,
        status: Status,
        output: Sequence[OutputItem] = (),
        *,
        usage: ResponseUsage | None = None,
        error: ResponseError | None = None,
    ) -> ResponseObject:
        return response_object(
            self._body,
            response_id=self._id,
            created_at=self._created_at,
            model=self._model,
            status=status,
            output=output,
            usage=usage,
            error=error,
        )

    def _stage(self, kind: Stage, response: ResponseObject) -> ResponseStageEvent:
        return {"type": kind, "sequence_number": next(self._numbers), "response": response}


def _of_text(piece: ChatPiece) -> list[ChatTokenLogprob]:
    """The log-probabilities of the tokens of the content, without those of markers and of other items."""
    text = "".join(delta.text for delta in piece.deltas if isinstance(delta, ContentDelta)).encode()
    if not piece.logprobs or not text:
        return []
    return token_logprobs(_overlapping(piece.logprobs, text))


def _overlapping(tokens: Sequence[TokenLogprob], text: bytes) -> Sequence[TokenLogprob]:
    """The tokens that have a part in ``text``. If ``text`` is not found in the tokens, all of them."""
    begin = b"".join(bytes(token.bytes) for token in tokens).rfind(text)
    if begin < 0:
        return tokens  # the text begins with a character that an earlier token began
    end, at, found = begin + len(text), 0, []
    for token in tokens:
        if at < end and at + len(token.bytes) > begin:
            found.append(token)
        at += len(token.bytes)
    return found
