r"""The only encoder of events to Server-Sent Events, and the response that carries them.

A stream goes ``Running -> SendingDone -> Done``: frames ``data: <one line of JSON>\n\n`` while events come, then
``data: [DONE]\n\n`` once, as the last frame, however the events ended. A source that fails, or ends without its
terminal event, gets one first. ``: keep-alive\n\n`` is sent after silence only. There are no ``id:``, ``retry:`` or
``event:`` lines.
"""

import asyncio
import enum
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import anyio
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from rbee_worker.errors import RbeeError
from rbee_worker.events import Event, InferenceFailed, LoadFailed, LoadingEvent, to_json
from rbee_worker.server.words import in_words

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}

log = logging.getLogger(__name__)

_MAX_WAITING = 64
"""Frames held for a client that does not read; then the source is left to wait (and to skip, where it may)."""


class Encoder(Protocol):
    """Turns an event into its frames (usually one; none is allowed)."""

    def __call__(self, event: Event, /) -> bytes:
        """The bytes to send for ``event``."""


class Failure(Protocol):
    """Makes the terminal event of a stream whose source failed; ``last`` is the event before it, if any."""

    def __call__(self, error: RbeeError, last: Event | None, /) -> Event:
        """The event that says ``error``."""


class StreamState(enum.Enum):
    """Where a stream is; it only moves down this list."""

    RUNNING = "running"
    SENDING_DONE = "sending_done"
    DONE = "done"


def encode(event: Event) -> bytes:
    """One event as one frame."""
    # A name that is no Unicode is escaped, in a form that JSON reads.
    return b"data: " + to_json(event).encode(errors="backslashreplace") + b"\n\n"


def encode_error(error: RbeeError) -> bytes:
    """The whole body of a stream that never began: the error's frame and ``[DONE]``."""
    return encode(inference_failed(error)) + DONE


class SharedFrames:
    """An :class:`Encoder` that encodes an event once for all the streams that carry it.

    Events are told apart by identity: the last ``size`` of them are kept alive, so that no id is used twice.
    """

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._frames: dict[int, tuple[Event, bytes]] = {}

    def __call__(self, event: Event) -> bytes:
        """The frame of ``event``."""
        known = self._frames.get(id(event))
        if known is not None:
            return known[1]
        frame = encode(event)
        self._frames[id(event)] = (event, frame)
        if len(self._frames) > self._size:
            del self._frames[next(iter(self._frames))]
        return frame


def inference_failed(error: RbeeError, _last: Event | None = None) -> InferenceFailed:
    """The ``error`` event of a job."""
    return InferenceFailed(code=error.code, message=in_words(error))


def loading_failed(error: RbeeError, last: Event | None = None) -> LoadFailed:
    """The ``error`` event of a progress stream, numbered after ``last``."""
    seq, elapsed = (last.seq + 1, last.elapsed_seconds) if isinstance(last, LoadingEvent) else (0, 0.0)
    return LoadFailed(seq=seq, elapsed_seconds=elapsed, code=error.code, message=in_words(error))


class EventStream(EventSourceResponse):
    """Streams the events of ``source`` until the terminal one, then ``[DONE]``.

    A task of its own reads ``source`` for as long as the response lives, so that no timeout ever cancels a read half
    way and loses an event; events that wait already leave in one write. When the response ends, for whatever reason,
    ``on_close`` is called at once if the terminal event had not come, and ``source`` is closed.

    Args:
        source: the events; closed with ``aclose()`` where it has one, also when it was never started.
        failure: makes the terminal event when ``source`` raises or ends without one.
        encoder: event to frames.
        on_close: called, without waiting, when the client left before the end (to cancel the job).
        keep_alive: seconds of silence before a comment line; 0: never.
        send_timeout: seconds that a client may leave bytes unread; 0: for ever.
        open_streams: holds this stream while it is being sent.
    """

    def __init__(
        self,
        source: AsyncIterator[Event],
        *,
        failure: Failure,
        encoder: Encoder = encode,
        on_close: Callable[[], object] | None = None,
        keep_alive: float = 10.0,
        send_timeout: float = 60.0,
        open_streams: "set[EventStream] | None" = None,
    ) -> None:
        super().__init__(self._chunks(), headers=HEADERS, sep="\n", ping=0, send_timeout=send_timeout or None)
        self.state = StreamState.RUNNING
        self._source = source
        self._failure = failure
        self._encode = encoder
        self._on_close = on_close
        self._keep_alive = keep_alive
        self._open_streams = open_streams if open_streams is not None else set()
        self._pumping: asyncio.Task[None] | None = None
        self._waiting: list[bytes] = []
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._last: Event | None = None
        self._read = False  # the source has given all it will
        self._silent = False  # a keep-alive is due
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; returns when it is complete or the client has left."""
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        pump = self._pumping = loop.create_task(self._pump())
        self._open_streams.add(self)
        timer = _IdleTimer(self._keep_alive, self._idle_since, self._on_silence)
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("stream ended: the client left its bytes unread for %g s", self.send_timeout)
        finally:
            self._open_streams.discard(self)
            timer.cancel()
            pump.cancel()
            if self._on_close is not None and not self._terminal:
                self._on_close()
            # Cleanup in a cancelled scope is cancelled too, unless it is shielded.
            with anyio.CancelScope(shield=True):
                await asyncio.wait({pump})
                await self._close_source()

    def finish(self, error: RbeeError) -> None:
        """End the stream now, with ``error`` unless its terminal event has come, and ``[DONE]``."""
        if not self._terminal:
            self._put(self._failure(error, self._last))
        if self._pumping is not None:
            self._pumping.cancel()

    @property
    def _terminal(self) -> bool:
        return self._last is not None and self._last.terminal

    async def _pump(self) -> None:
        try:
            async for event in self._source:
                self._put(event)
                if event.terminal:
                    break
                if len(self._waiting) >= _MAX_WAITING:
                    self._room.clear()
                    await self._room.wait()
            if not self._terminal:
                self._put(self._failure(RbeeError("The stream ended before its result."), self._last))
        except Exception as error:  # noqa: BLE001 - whatever it was, the client gets its error frame and [DONE]
            self._put(self._failure(_public(error), self._last))
        finally:
            self._read = True
            self._wake.set()

    def _put(self, event: Event) -> None:
        self._waiting.append(self._encode(event))
        self._last = event
        self._wake.set()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while self.state is StreamState.RUNNING:
            await self._wake.wait()
            self._wake.clear()
            chunk = b"".join(self._waiting)
            self._waiting.clear()
            self._room.set()
            if self._read:
                self.state = StreamState.SENDING_DONE
                chunk += DONE
            elif self._silent and not chunk:
                chunk = KEEP_ALIVE
            self._silent = False
            if chunk:
                yield chunk
                self._sent_at = asyncio.get_running_loop().time()
        self.state = StreamState.DONE

    def _idle_since(self) -> float:
        return self._sent_at

    def _on_silence(self) -> None:
        self._silent = True
        self._wake.set()

    async def _close_source(self) -> None:
        aclose = getattr(self._source, "aclose", None)
        if aclose is None:
            return
        try:
            await aclose()
        except Exception:
            log.exception("closing a stream's source failed")


class _IdleTimer:
    """Calls ``action`` after each ``seconds`` without sending; costs nothing per frame."""

    def __init__(self, seconds: float, idle_since: Callable[[], float], action: Callable[[], None]) -> None:
        self._seconds = seconds
        self._idle_since = idle_since
        self._action = action
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        if seconds > 0:
            self._handle = self._loop.call_later(seconds, self._tick)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _tick(self) -> None:
        due = self._idle_since() + self._seconds
        now = self._loop.time()
        if due <= now:
            self._action()
            due = now + self._seconds
        self._handle = self._loop.call_at(due, self._tick)


def _public(error: Exception) -> RbeeError:
    """What a client may know of ``error``."""
    if isinstance(error, RbeeError):
        return error
    log.error("a stream failed", exc_info=error)
    return RbeeError("The worker failed; its log says why.")
