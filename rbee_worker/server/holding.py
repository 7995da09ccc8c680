"""Requests that wait for a load to end, instead of being refused: ``serve --hold-requests``."""

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from rbee_worker.config import ServerConfig
from rbee_worker.errors import QueueFull
from rbee_worker.server.http.envelope import off_loop
from rbee_worker.worker.worker import Worker


class Cancellable(Protocol):
    """A job, or several."""

    def cancel(self) -> object:
        """Ask for the end."""


J = TypeVar("J", bound=Cancellable)


class Holding:
    """Holds the streaming requests of all routes, ``max_queue`` of them at most."""

    def __init__(self, worker: Worker, config: ServerConfig) -> None:
        self._worker = worker
        self._config = config
        self._held = 0

    def due(self) -> bool:
        """Whether a request that comes now is to be held.

        Raises:
            QueueFull: it would be, but as many are held as may.
        """
        if not (self._config.hold_requests and self._worker.changing):
            return False
        if self._held >= self._config.max_queue:
            raise QueueFull(f"The queue is full: {self._held} of {self._config.max_queue}.", retry_after=1)
        return True

    async def begin(self, size: int, submit: Callable[[], J]) -> J:
        """What ``submit()`` gives once the load has ended.

        Args:
            size: of the request; see :func:`~rbee_worker.server.http.envelope.off_loop`.
            submit: submits the request.
        """
        self._held += 1
        try:
            await self._worker.settled()
        finally:
            self._held -= 1
        submission = asyncio.ensure_future(off_loop(size, submit))
        try:
            # Shielded: a client that leaves just now must not leave behind a job that nobody knows of.
            return await asyncio.shield(submission)
        except asyncio.CancelledError:
            submission.add_done_callback(_cancel_unwanted)
            raise


def _cancel_unwanted(submission: "asyncio.Future[J]") -> None:
    if not submission.cancelled() and submission.exception() is None:
        submission.result().cancel()
