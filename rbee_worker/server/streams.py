"""Makes the streams of all routes, and holds requests during a load (``serve --hold-requests``)."""

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
    """One or several jobs."""

    def cancel(self) -> object:
        """Cancel them. Does not wait for their end."""


J = TypeVar("J", bound=Cancellable)
Failure = Callable[[RbeeError], bytes]


class Streams:
    """Makes the streams of all routes. At most ``max_queue`` requests are held until a load has ended.

    Attributes:
        open: the streams that are being sent now.
    """

    def __init__(self, worker: Worker, config: ServerConfig) -> None:
        self.open: set[EventStream] = set()
        self._worker = worker
        self._config = config
        self._held: set[asyncio.Future[None]] = set()

    def of(self, frames: Frames, failure: Failure, on_close: Callable[[], object] | None = None) -> EventStream:
        """A stream of ``frames``. The arguments are those of :class:`~rbee_worker.server.sse.EventStream`."""
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
        """Submit jobs, and return their stream. With ``hold_requests``, jobs are submitted after a running load.

        Args:
            size: of the request; see :func:`~rbee_worker.server.http.envelope.off_loop`.
            submit: submits the jobs.
            frames: gives the frames of the jobs. Closing them cancels the jobs.
            failure: makes the last frames of a stream that fails.

        Raises:
            QueueFull: too many requests are held.
            RbeeError: what ``submit()`` raises. If the request is held, its stream carries the error instead.
        """
        if self._config.hold_requests and self._worker.changing:
            if len(self._held) >= self._config.max_queue:
                raise QueueFull(f"The queue is full: {len(self._held)} of {self._config.max_queue}.", retry_after=1)
            settled = asyncio.ensure_future(self._worker.settled())
            self._held.add(settled)
            settled.add_done_callback(self._held.discard)
            return self.of(_held_frames(settled, size, submit, frames), failure, settled.cancel)
        jobs = await submitted(size, submit)
        return self.of(frames(jobs), failure, jobs.cancel)


async def submitted(size: int, submit: Callable[[], J]) -> J:
    """The jobs that ``submit()`` gives. If the caller is cancelled meanwhile, the jobs are cancelled too.

    Args:
        size: of the request; see :func:`~rbee_worker.server.http.envelope.off_loop`.
        submit: submits the jobs. If it runs in a thread, nothing can stop it.
    """
    submission = asyncio.ensure_future(off_loop(size, submit))
    try:
        # Shielded: if the client leaves now, the submission still ends, and its jobs can be cancelled.
        return await asyncio.shield(submission)
    except asyncio.CancelledError:
        submission.add_done_callback(_cancel_unwanted)
        raise


def _cancel_unwanted(submission: "asyncio.Future[J]") -> None:
    if not submission.cancelled() and submission.exception() is None:
        submission.result().cancel()


async def _held_frames(
    settled: asyncio.Future[None], size: int, submit: Callable[[], J], frames: Callable[[J], Frames]
) -> Frames:
    await settled
    async with aclosing(frames(await submitted(size, submit))) as source:
        async for one in source:
            yield one
