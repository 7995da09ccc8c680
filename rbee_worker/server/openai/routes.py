"""The routes that OpenAI's clients ask for."""

import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Final, TypeVar

import anyio.to_thread
from starlette.requests import Request

from rbee_worker.config import ServerConfig
from rbee_worker.errors import Cancelled, DeadlineExceeded, InferenceError, ModelNotFound, OutOfMemory, RbeeError
from rbee_worker.events import Event
from rbee_worker.server import sse
from rbee_worker.server.holding import Cancellable, Holding
from rbee_worker.server.http.access import client_of
from rbee_worker.server.http.envelope import ALWAYS, Json, off_loop, read_object
from rbee_worker.server.http.operation import ERRORS_OF_JOBS, Errors, Operation
from rbee_worker.server.openai.chat.body import ChatBody
from rbee_worker.server.openai.chat.chat import (
    ChatChunks,
    ChatCompletion,
    ChatCompletionChunk,
    to_conversation,
    whole_chat,
)
from rbee_worker.server.openai.completions.body import CompletionBody
from rbee_worker.server.openai.completions.completions import (
    Completion,
    CompletionChunk,
    CompletionChunks,
    CompletionReply,
    CompletionStep,
    begin_completion,
    whole_completion,
)
from rbee_worker.server.openai.conversation import ChatStep, ConversationReply, begin_conversation
from rbee_worker.server.openai.models import Model, ModelList, Models
from rbee_worker.server.openai.requests import new_id
from rbee_worker.server.openai.responses.body import ResponsesBody
from rbee_worker.server.openai.responses.events import RESPONSE_EVENTS, encode_events
from rbee_worker.server.openai.responses.events import failed as response_failed
from rbee_worker.server.openai.responses.object import ResponseObject, ResponseWriter
from rbee_worker.server.openai.responses.responses import begin_response, response_events, whole_response
from rbee_worker.server.openai.responses.responses import to_conversation as to_response_conversation
from rbee_worker.server.openai.streams import (
    Ahead,
    Chunks,
    ChunkSource,
    FailedChunk,
    LastChunks,
    Step,
    chunks_failed,
    encode_chunks,
    unless_left,
)
from rbee_worker.worker.worker import Worker

S = TypeVar("S", bound=Step)
R = TypeVar("R", bound=Cancellable)

_ERRORS: Final[Errors] = (ModelNotFound, *ERRORS_OF_JOBS, Cancelled, InferenceError, OutOfMemory, DeadlineExceeded)


class OpenAI:
    """The handlers; one instance per application.

    Args:
        worker: what answers.
        config: limits, and the names of the model.
        holding: the streaming requests that wait for a load, of all routes.
        streams: those that are being sent now, of all routes.
    """

    def __init__(self, worker: Worker, config: ServerConfig, holding: Holding, streams: set[sse.EventStream]) -> None:
        self._worker = worker
        self._config = config
        self._holding = holding
        self._streams = streams
        self._models = Models(worker, config.served_model_names)

    @Operation("GET", "/v1/models", tag="openai")
    async def models(self, _request: Request) -> Json[ModelList]:
        """The model, by its names."""
        return Json({"object": "list", "data": await anyio.to_thread.run_sync(self._models.listed)})

    @Operation(
        "GET",
        "/v1/models/{model:path}",
        tag="openai",
        parameters={"model": "The name; it may hold slashes."},
        errors=(ModelNotFound,),
    )
    async def model(self, request: Request) -> Json[Model]:
        """One of the names."""
        return Json(await anyio.to_thread.run_sync(self._models.find, request.path_params["model"]))

    @Operation(
        "POST",
        "/v1/completions",
        tag="openai",
        body=CompletionBody,
        frames=(CompletionChunk, FailedChunk),
        errors=_ERRORS,
    )
    async def complete(self, request: Request) -> Json[Completion] | sse.EventStream:
        """Continue prompts, in OpenAI's shape.

        With `stream` the answer is a stream, the last frame of which is `[DONE]`. Fields of other servers that would
        change the answer are refused by name; other unknown ones are not.
        """
        size = len(await request.body())
        body = await off_loop(size, CompletionBody.parse, await read_object(request))
        size = ALWAYS if body.grammar_spec is not None else size

        def begin() -> CompletionReply:
            self._models.check(body.model)
            return begin_completion(self._worker, body, client_of(request.scope))

        def chunks(reply: CompletionReply) -> ChunkSource[CompletionStep]:
            return ChunkSource(reply, CompletionChunks(reply, body, self._models.name))

        if body.stream:
            return await self._stream(request, size, begin, chunks)
        async with aclosing(await off_loop(size, begin)) as reply:
            whole = whole_completion(reply, body, self._models.name)
            return Json(await unless_left(request, whole))

    @Operation(
        "POST",
        "/v1/chat/completions",
        tag="openai",
        body=ChatBody,
        frames=(ChatCompletionChunk, FailedChunk),
        errors=_ERRORS,
    )
    async def chat(self, request: Request) -> Json[ChatCompletion] | sse.EventStream:
        """Answer a conversation, in OpenAI's shape.

        With `stream` the answer is a stream, the last frame of which is `[DONE]`. Fields of other servers that would
        change the answer are refused by name; other unknown ones are not.
        """
        size = len(await request.body())
        body = await off_loop(size, ChatBody.parse, await read_object(request))
        conversation = await off_loop(size, to_conversation, body, client_of(request.scope))
        size = ALWAYS if conversation.grammar is not None or conversation.tools else size
        response_id = new_id("chatcmpl")

        def begin() -> ConversationReply:
            self._models.check(body.model)
            return begin_conversation(self._worker, conversation, response_id)

        def chunks(reply: ConversationReply) -> ChunkSource[ChatStep]:
            return ChunkSource(reply, ChatChunks(reply, body, response_id, self._models.name))

        if body.stream:
            return await self._stream(request, size, begin, chunks)
        async with aclosing(await off_loop(size, begin)) as reply:
            whole = whole_chat(reply, body, response_id, self._models.name)
            return Json(await unless_left(request, whole))

    @Operation(
        "POST",
        "/v1/responses",
        tag="openai",
        body=ResponsesBody,
        frames=RESPONSE_EVENTS,
        errors=_ERRORS,
    )
    async def respond(self, request: Request) -> Json[ResponseObject] | sse.EventStream:
        """Make a response, in OpenAI's shape.

        Nothing of it is kept. With `stream` the answer is a stream, the last frame of which is `[DONE]`. Each frame has
        an `event` line too. Fields of other servers that would change the answer are refused by name; other unknown
        ones are not.
        """
        size = len(await request.body())
        body = await off_loop(size, ResponsesBody.parse, await read_object(request))
        conversation = await off_loop(size, to_response_conversation, body, client_of(request.scope))
        size = ALWAYS if conversation.grammar is not None or conversation.tools else size
        response = ResponseWriter(body, f"resp_{uuid.uuid4().hex}", int(time.time()))

        def begin() -> ConversationReply:
            self._models.check(body.model)
            return begin_response(self._worker, conversation, response.id)

        def events(reply: ConversationReply) -> ChunkSource[ChatStep]:
            return ChunkSource(reply, response_events(reply, response, self._models.name))

        def failure(error: RbeeError, last: Event | None) -> LastChunks:
            return response_failed(response, self._models.name, error, last)

        if body.stream:
            return await self._stream(request, size, begin, events, failure=failure, encoder=encode_events)
        async with aclosing(await off_loop(size, begin)) as reply:
            whole = whole_response(reply, response, self._models.name)
            return Json(await unless_left(request, whole))

    async def _stream(
        self,
        request: Request,
        size: int,
        begin: Callable[[], R],
        chunks: Callable[[R], ChunkSource[S]],
        *,
        failure: sse.Failure = chunks_failed,
        encoder: sse.Encoder = encode_chunks,
    ) -> sse.EventStream:
        """The stream of a reply. Its 200 goes out with the first chunk, or when a keep-alive is due."""
        source: AsyncIterator[Chunks]
        cancel = None
        if self._holding.due():
            source = self._held(size, begin, chunks)
        else:
            source = chunks(await off_loop(size, begin))
            cancel = source.cancel
        ahead = Ahead(source)
        try:
            await unless_left(request, ahead.settle(self._config.keep_alive_seconds or None))
        except BaseException:
            await ahead.aclose()
            raise
        return sse.EventStream(
            ahead,
            failure=failure,
            encoder=encoder,
            on_close=cancel,
            keep_alive=self._config.keep_alive_seconds,
            send_timeout=self._config.send_timeout_seconds,
            open_streams=self._streams,
        )

    async def _held(
        self, size: int, begin: Callable[[], R], chunks: Callable[[R], ChunkSource[S]]
    ) -> AsyncIterator[Chunks]:
        """The chunks of a reply that begins when the load has ended."""
        async with aclosing(chunks(await self._holding.begin(size, begin))) as source:
            async for chunk in source:
                yield chunk
