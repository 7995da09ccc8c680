"""The streams of all routes, and their requests that wait for a load: ``serve --hold-requests``."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Protocol, TypeVar

from rbee_worker.config import ServerConfig
from rbee_worker.errors import QueueFull, RbeeError
from rbee_worker.server.http.envelope import off_loop
from rbee_worker.server.sse import EventStream, Frames
from rbee_worker.worker.worker import Worker


class Cancellable(Protocol):
    """A job, or several."""

    def cancel(self) -> object:
        """Ask for the end."""


J = TypeVar("J", bound=Cancellable)
Failure = Callable[[RbeeError], bytes]


class Streams:
    """Makes the streams of all routes; holds ``max_queue`` requests at most until a load has ended.

    Attributes:
        open: those that are being sent now.
    """

    def __init__(self, worker: Worker, config: ServerConfig) -> None:
        self.open: set[EventStream] = set()
        self._worker = worker
        self._config = config
        self._held = 0

    def of(self, frames: Frames, failure: Failure, on_close: Callable[[], object] | None = None) -> EventStream:
        """The stream of some frames; see :class:`~rbee_worker.server.sse.EventStream`."""
        return EventStream(
            frames,
            failure=failure,
            on_close=on_close,
            keep_alive=self._config.keep_alive_seconds,
            send_timeout=self._config.send_timeout_seconds,
            open_streams=self.open,
        )

    async def of_jobs(
        self, size: int, submit: Callable[[], J], frames: Callable[[J], Frames], failure: Failure
    ) -> EventStream:
        """The stream of the jobs that ``submit()`` gives, once a load has ended where the request is to be held.

        Args:
            size: of the request; see :func:`~rbee_worker.server.http.envelope.off_loop`.
            submit: submits the request.
            frames: those of what was submitted; closing them cancels it.
            failure: the last frames of a stream that fails.

        Raises:
            QueueFull: as many requests are held as may.
            RbeeError: what ``submit()`` raises, unless the request is held: then its stream says so.
        """
        if self._config.hold_requests and self._worker.changing:
            if self._held >= self._config.max_queue:
                raise QueueFull(f"The queue is full: {self._held} of {self._config.max_queue}.", retry_after=1)
            return self.of(self._held_frames(size, submit, frames), failure)
        jobs = await off_loop(size, submit)
        return self.of(frames(jobs), failure, jobs.cancel)

    async def _held_frames(self, size: int, submit: Callable[[], J], frames: Callable[[J], Frames]) -> Frames:
        self._held += 1
        try:
            await self._worker.settled()
        finally:
            self._held -= 1
        submission = asyncio.ensure_future(off_loop(size, submit))
        try:
            # Shielded: a client that leaves just now must not leave behind a job that nobody knows of.
            jobs = await asyncio.shield(submission)
        except asyncio.CancelledError:
            submission.add_done_callback(_cancel_unwanted)
            raise
        async with aclosing(frames(jobs)) as source:
            async for one in source:
                yield one


def _cancel_unwanted(submission: "asyncio.Future[J]") -> None:
    if not submission.cancelled() and submission.exception() is None:
        submission.result().cancel()
