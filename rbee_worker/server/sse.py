r"""Server-Sent Events: how a frame is written, and the response that sends frames.

A stream goes through ``RUNNING -> SENDING_DONE -> DONE``. It sends frames ``data: <one line of JSON>\n\n`` while its
source gives some. The last frame is always ``data: [DONE]\n\n``, however the source ended. ``: keep-alive\n\n`` is sent
only after silence. There are no ``id:`` and ``retry:`` lines, and ``event:`` lines only in formats that need them.
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
"""Frames held for a client that does not read. When there are more, the source is not read until there is room."""


class StreamState(enum.Enum):
    """The state of a stream. It moves only in this order."""

    RUNNING = "running"
    SENDING_DONE = "sending_done"
    DONE = "done"


def frame(data: Mapping[str, object], event: str | None = None) -> bytes:
    """One frame: an object as a line of JSON in UTF-8; before it, if ``event`` is given, an ``event:`` line."""
    # Text that is not valid Unicode, such as some file names, is escaped in a form that JSON can read.
    line = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
    name = b"event: %b\n" % event.encode() if event is not None else b""
    return b"%bdata: %b\n\n" % (name, line)


class EventStream(EventSourceResponse):
    """Sends the frames of a source, then ``[DONE]``.

    A separate task reads the source during the whole response, so that no timeout can cancel a read and lose a frame.
    All waiting frames are sent in one write. When the response ends, for any reason, the source is closed.

    Args:
        frames: the source.
        failure: makes the last frames, before ``[DONE]``, when the source raised.
        on_close: called when the stream ends before its source, to cancel the job. It must not wait. Closing the
            source is not enough, because a generator that was never started runs no cleanup.
        keep_alive: seconds of silence before a comment line is sent; 0: never.
        send_timeout: seconds that a client may leave bytes unread; 0: no limit.
        open_streams: this stream is in the set while it is being sent.

    Attributes:
        state: see :class:`StreamState`.
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
        self._read = False  # whether the source has ended
        self._finishing = False
        self._silent = False  # whether a keep-alive is due
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Returns when it is complete or the client has left."""
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
        """Start to read the source, and wait for the first frame, at most ``seconds`` (None: no limit).

        Call it before the response begins. Then a request that fails at once gets the status of its failure, and one
        that waits long gets its stream.

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
        """End the stream: send what is ready, then ``error`` unless the source has ended, then ``[DONE]``."""
        self._finishing = True
        self._room.set()
        asyncio.get_running_loop().call_soon(self._stop, error)

    async def aclose(self) -> None:
        """Stop reading, and close the source."""
        reading = self._reading
        if self._on_close is not None and (reading is None or not reading.done() or reading.cancelled()):
            self._on_close()
        # In a cancelled scope, cleanup is cancelled too, unless it is shielded.
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
        except Exception as error:  # noqa: BLE001 - the client gets an error frame and [DONE] for every failure
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
    """Calls ``action`` after each ``seconds`` without sending. Sending a frame does not touch the timer."""

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
    """The error that a client may see: the error itself, or a general one if it was not expected."""
    if isinstance(error, RbeeError):
        return error
    log.error("a stream failed", exc_info=error)
    return RbeeError("The worker failed; its log says why.")
