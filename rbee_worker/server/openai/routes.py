"""The routes for OpenAI's clients."""

import uuid
from collections.abc import Callable
from typing import Final, TypeVar

import anyio.to_thread
from starlette.requests import Request

from rbee_worker.config import ServerConfig
from rbee_worker.errors import Cancelled, DeadlineExceeded, InferenceError, ModelNotFound, OutOfMemory, RbeeError
from rbee_worker.server.http.access import client_of
from rbee_worker.server.http.disconnect import unless_left
from rbee_worker.server.http.envelope import ALWAYS, Json, off_loop, read_object
from rbee_worker.server.http.operation import ERRORS_OF_JOBS, Errors, Operation
from rbee_worker.server.openai.chat.body import ChatBody
from rbee_worker.server.openai.chat.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    chat_frames,
    to_conversation,
    whole_chat,
)
from rbee_worker.server.openai.choices import Choices
from rbee_worker.server.openai.chunks import FailedChunk, failed_chunk
from rbee_worker.server.openai.completions.body import CompletionBody
from rbee_worker.server.openai.completions.completions import (
    Completion,
    CompletionChoices,
    CompletionChunk,
    begin_completion,
    completion_frames,
    whole_completion,
)
from rbee_worker.server.openai.conversation import ChatChoices, begin_conversation
from rbee_worker.server.openai.models import Model, ModelList, Models
from rbee_worker.server.openai.requests import new_id
from rbee_worker.server.openai.responses.body import ResponsesBody
from rbee_worker.server.openai.responses.events import RESPONSE_EVENTS, ResponseWriter
from rbee_worker.server.openai.responses.object import ResponseObject
from rbee_worker.server.openai.responses.responses import begin_response
from rbee_worker.server.openai.responses.responses import to_conversation as to_response_conversation
from rbee_worker.server.sse import EventStream, Frames
from rbee_worker.server.streams import Streams, submitted
from rbee_worker.worker.worker import Worker

_ERRORS: Final[Errors] = (ModelNotFound, *ERRORS_OF_JOBS, Cancelled, InferenceError, OutOfMemory, DeadlineExceeded)

C = TypeVar("C", bound=Choices)


class OpenAI:
    """The handlers. An application has one instance.

    Args:
        worker: runs the jobs.
        config: limits, and the names of the model.
        streams: makes the streams of all routes.
    """

    def __init__(self, worker: Worker, config: ServerConfig, streams: Streams) -> None:
        self._worker = worker
        self._config = config
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
    async def complete(self, request: Request) -> Json[Completion] | EventStream:
        """Continue prompts, in OpenAI's shape.

        With `stream` the answer is a stream, the last frame of which is `[DONE]`. Fields of other servers that would
        change the answer are refused by name; other unknown ones are not.
        """
        size = len(await request.body())
        body = await off_loop(size, CompletionBody.parse, await read_object(request))
        size = ALWAYS if body.grammar_spec is not None else size

        def submit() -> CompletionChoices:
            self._models.check(body.model)
            return begin_completion(self._worker, body, client_of(request.scope))

        def frames(choices: CompletionChoices) -> Frames:
            return completion_frames(choices, body, self._models.name)

        if body.stream:
            return await self._stream(request, size, submit, frames, failed_chunk)
        choices = await submitted(size, submit)
        return Json(await unless_left(request, whole_completion(choices, body, self._models.name)))

    @Operation(
        "POST",
        "/v1/chat/completions",
        tag="openai",
        body=ChatBody,
        frames=(ChatCompletionChunk, FailedChunk),
        errors=_ERRORS,
    )
    async def chat(self, request: Request) -> Json[ChatCompletion] | EventStream:
        """Answer a conversation, in OpenAI's shape.

        With `stream` the answer is a stream, the last frame of which is `[DONE]`. Fields of other servers that would
        change the answer are refused by name; other unknown ones are not.
        """
        size = len(await request.body())
        body = await off_loop(size, ChatBody.parse, await read_object(request))
        conversation = await off_loop(size, to_conversation, body, client_of(request.scope))
        size = ALWAYS if conversation.grammar is not None or conversation.tools else size
        response_id = new_id("chatcmpl")

        def submit() -> ChatChoices:
            self._models.check(body.model)
            return begin_conversation(self._worker, conversation, response_id)

        def frames(choices: ChatChoices) -> Frames:
            return chat_frames(choices, body, response_id, self._models.name)

        if body.stream:
            return await self._stream(request, size, submit, frames, failed_chunk)
        choices = await submitted(size, submit)
        return Json(await unless_left(request, whole_chat(choices, body, response_id, self._models.name)))

    @Operation("POST", "/v1/responses", tag="openai", body=ResponsesBody, frames=RESPONSE_EVENTS, errors=_ERRORS)
    async def respond(self, request: Request) -> Json[ResponseObject] | EventStream:
        """Make a response, in OpenAI's shape.

        Nothing of it is kept. With `stream` the answer is a stream, the last frame of which is `[DONE]`. Each frame has
        an `event` line too. Fields of other servers that would change the answer are refused by name; other unknown
        ones are not.
        """
        size = len(await request.body())
        body = await off_loop(size, ResponsesBody.parse, await read_object(request))
        conversation = await off_loop(size, to_response_conversation, body, client_of(request.scope))
        size = ALWAYS if conversation.grammar is not None or conversation.tools else size
        response_id = f"resp_{uuid.uuid4().hex}"
        writer = ResponseWriter(body, response_id)

        def submit() -> ChatChoices:
            self._models.check(body.model)
            return begin_response(self._worker, conversation, response_id)

        def frames(choices: ChatChoices) -> Frames:
            return writer.frames(choices, self._models.name)

        if body.stream:
            return await self._stream(request, size, submit, frames, writer.failed)
        choices = await submitted(size, submit)
        return Json(await unless_left(request, writer.whole(choices, self._models.name)))

    async def _stream(
        self,
        request: Request,
        size: int,
        submit: Callable[[], C],
        frames: Callable[[C], Frames],
        failure: Callable[[RbeeError], bytes],
    ) -> EventStream:
        """A stream of choices. Its 200 is sent with the first frame, or when a keep-alive is due."""
        stream = await self._streams.of_jobs(size, submit, frames, failure)
        try:
            await unless_left(request, stream.first_frame(self._config.keep_alive_seconds or None))
        except BaseException:
            await stream.aclose()
            raise
        return stream
