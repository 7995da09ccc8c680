"""How answers reach their client: as chunks of a stream, or whole; and what happens when it leaves before."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from starlette.requests import ClientDisconnect, Request
from typing_extensions import TypedDict

from rbee_worker.errors import RbeeError
from rbee_worker.events import Event, InferenceEvent, Started
from rbee_worker.server.http.envelope import OPENAI_CODES, ErrorDetail, envelope

T = TypeVar("T")
C_co = TypeVar("C_co", covariant=True)
Object = Mapping[str, Any]


class FailedChunk(TypedDict):
    """The error with which a stream of chunks ends when it fails."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks(InferenceEvent):
    """JSON objects to be sent, each as one frame."""

    event: ClassVar[str] = "chunks"
    objects: tuple[Object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastChunks(Chunks):
    """Those after which nothing but ``[DONE]`` comes."""

    terminal: ClassVar[bool] = True


def encode_chunks(event: Event) -> bytes:
    """The frames of :class:`Chunks`."""
    objects = event.objects if isinstance(event, Chunks) else ()
    return b"".join(b"data: " + to_json(item) + b"\n\n" for item in objects)


def to_json(item: Object) -> bytes:
    """One line of JSON, UTF-8 text unescaped."""
    return json.dumps(item, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def chunks_failed(error: RbeeError, _last: Event | None = None) -> LastChunks:
    """The terminal frame of a stream that fails: OpenAI's error object."""
    chunk: FailedChunk = {"error": envelope(error, OPENAI_CODES)["error"]}
    return LastChunks(objects=(chunk,))


class Reply(Protocol[C_co]):
    """The steps of one request's answers."""

    @property
    def ended(self) -> bool:
        """Whether the last step has been given."""

    def cancel(self) -> None:
        """Ask for the end."""

    async def __anext__(self) -> C_co:
        """The next step; may be cancelled without loss."""

    async def aclose(self) -> None:
        """Stop listening, and cancel what has not ended."""


class Step(Protocol):
    """A step of a reply, made by an event of a job."""

    @property
    def event(self) -> InferenceEvent:
        """The event."""


S = TypeVar("S", bound=Step)


class ChunkSource(Generic[S]):
    """The chunks of a reply, for an :class:`~rbee_worker.server.sse.EventStream`.

    Its first chunks come with the first event after ``started``: what fails until then fails ``anext`` before anything
    was sent.
    """

    def __init__(self, reply: Reply[S], write: Callable[[S], Sequence[Object]]) -> None:
        self._reply = reply
        self._write = write
        self._waiting: list[Object] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunks:
        if self._reply.ended:
            raise StopAsyncIteration
        while True:
            step = await anext(self._reply)
            self._waiting += self._write(step)
            if self._reply.ended:
                return LastChunks(objects=self._taken())
            if self._waiting and not isinstance(step.event, Started):
                return Chunks(objects=self._taken())

    def cancel(self) -> None:
        """Ask for the end of its jobs."""
        self._reply.cancel()

    async def aclose(self) -> None:
        """Stop listening, and cancel what has not ended."""
        await self._reply.aclose()

    def _taken(self) -> tuple[Object, ...]:
        taken, self._waiting = tuple(self._waiting), []
        return taken


class Ahead:
    """A source whose first event is asked for before its response begins.

    So a request that fails at once gets the status of its failure; one that waits long gets its stream.
    """

    def __init__(self, source: AsyncIterator[Chunks]) -> None:
        self._source = source
        self._first: asyncio.Task[Chunks] | None = asyncio.create_task(_next(source))

    async def settle(self, seconds: float | None) -> None:
        """Return when the first event is there, or after ``seconds``.

        Raises:
            RbeeError: the source has failed.
        """
        if self._first is None:
            return
        await asyncio.wait({self._first}, timeout=seconds)
        if self._first.done():
            self._first.result()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunks:
        if self._first is None:
            return await anext(self._source)
        try:
            return await self._first
        finally:
            self._first = None

    async def aclose(self) -> None:
        """Close the source."""
        if self._first is not None:
            self._first.cancel()
            await asyncio.wait({self._first})
        aclose = getattr(self._source, "aclose", None)
        if aclose is not None:
            await aclose()


async def _next(source: AsyncIterator[Chunks]) -> Chunks:
    return await anext(source)


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves; the request's body must have been read.

    Raises:
        ClientDisconnect: the client has left.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
