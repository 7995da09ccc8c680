r"""Server-Sent Events: a frame, and the response that sends frames.

A stream goes ``Running -> SendingDone -> Done``: frames ``data: <one line of JSON>\n\n`` while its source has some,
then ``data: [DONE]\n\n`` once, as the last frame, however the source ended. ``: keep-alive\n\n`` is sent after silence
only. There are no ``id:`` and ``retry:`` lines, and ``event:`` lines only where a format has them.
"""

import asyncio
import enum
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import suppress

import anyio
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from rbee_worker.errors import RbeeError

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Frames = AsyncGenerator[bytes, None]

log = logging.getLogger(__name__)

_MAX_WAITING = 64
"""Frames held for a client that does not read; then the source is left to wait (and to skip, where it may)."""


class StreamState(enum.Enum):
    """Where a stream is; it only moves down this list."""

    RUNNING = "running"
    SENDING_DONE = "sending_done"
    DONE = "done"


def frame(data: Mapping[str, object], event: str | None = None) -> bytes:
    """One frame: an object as a line of JSON, UTF-8 text unescaped, after the line that names its event, if any."""
    # A name that is no Unicode is escaped, in a form that JSON reads.
    line = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
    name = b"event: %b\n" % event.encode() if event is not None else b""
    return b"%bdata: %b\n\n" % (name, line)


class EventStream(EventSourceResponse):
    """Sends the frames of a source, then ``[DONE]``.

    A task of its own reads the source for as long as the response lives, so that no timeout ever cancels a read half
    way and loses a frame; frames that wait already leave in one write. When the response ends, for whatever reason, the
    source is closed.

    Args:
        frames: the source. A generator that was never started has no cleanup: that is what ``on_close`` is for.
        failure: the last frames of a stream whose source raised.
        on_close: called, without waiting, when the stream ends before its source (to cancel the job).
        keep_alive: seconds of silence before a comment line; 0: never.
        send_timeout: seconds that a client may leave bytes unread; 0: for ever.
        open_streams: holds this stream while it is being sent.
    """

    def __init__(
        self,
        frames: Frames,
        *,
        failure: Callable[[RbeeError], bytes],
        on_close: Callable[[], object] | None = None,
        keep_alive: float = 10.0,
        send_timeout: float = 60.0,
        open_streams: "set[EventStream] | None" = None,
    ) -> None:
        super().__init__(self._chunks(), headers=HEADERS, sep="\n", ping=0, send_timeout=send_timeout or None)
        self.state = StreamState.RUNNING
        self._frames = frames
        self._failure = failure
        self._on_close = on_close
        self._keep_alive = keep_alive
        self._open_streams = open_streams if open_streams is not None else set()
        self._reading: asyncio.Task[None] | None = None
        self._waiting: list[bytes] = []
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._error: Exception | None = None
        self._read = False  # the source has given all it will
        self._finishing = False
        self._silent = False  # a keep-alive is due
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; returns when it is complete or the client has left."""
        self._sent_at = asyncio.get_running_loop().time()
        self._begin()
        self._open_streams.add(self)
        timer = _IdleTimer(self._keep_alive, self._idle_since, self._on_silence)
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("stream ended: the client left its bytes unread for %g s", self.send_timeout)
        finally:
            self._open_streams.discard(self)
            timer.cancel()
            await self.aclose()

    async def first_frame(self, seconds: float | None) -> None:
        """Begin to read before the response begins; returns when a frame is there, or after ``seconds``.

        So a request that fails at once gets the status of its failure, and one that waits long gets its stream.

        Raises:
            Exception: what the source raised before its first frame.
        """
        self._begin()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        if self._error is not None and not self._waiting:
            raise self._error

    def finish(self, error: RbeeError) -> None:
        """End the stream: what its source has at hand is sent, then ``error`` unless that was all, then ``[DONE]``."""
        self._finishing = True
        self._room.set()
        asyncio.get_running_loop().call_soon(self._stop, error)

    async def aclose(self) -> None:
        """Stop reading, and close the source."""
        reading = self._reading
        if self._on_close is not None and (reading is None or not reading.done() or reading.cancelled()):
            self._on_close()
        # Cleanup in a cancelled scope is cancelled too, unless it is shielded.
        with anyio.CancelScope(shield=True):
            if reading is not None:
                reading.cancel()
                await asyncio.wait({reading})
            try:
                await self._frames.aclose()
            except Exception:
                log.exception("closing a stream's source failed")

    def _begin(self) -> None:
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read_all())

    def _stop(self, error: RbeeError) -> None:
        if not self._read:
            self._end(error)
            if self._reading is not None:
                self._reading.cancel()

    def _end(self, error: Exception | None = None) -> None:
        if not self._read:
            self._error, self._read = error, True
            self._wake.set()

    async def _read_all(self) -> None:
        try:
            async for one in self._frames:
                self._waiting.append(one)
                self._wake.set()
                if len(self._waiting) >= _MAX_WAITING and not self._finishing:
                    self._room.clear()
                    await self._room.wait()
        except Exception as error:  # noqa: BLE001 - whatever it was, the client gets its error frame and [DONE]
            self._end(error)
        else:
            self._end()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while self.state is StreamState.RUNNING:
            await self._wake.wait()
            self._wake.clear()
            chunk = b"".join(self._waiting)
            self._waiting.clear()
            self._room.set()
            if self._read:
                self.state = StreamState.SENDING_DONE
                chunk += self._failure(_public(self._error)) if self._error is not None else b""
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
