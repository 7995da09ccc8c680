"""Job: a submitted request and the stream of its events, for one consumer on the event loop."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Self

from rbee_worker.events import InferenceEvent


class Job:
    """The events of one request, in order, to the terminal one. Closing it before that cancels the job.

    Attributes:
        id: unique among running jobs.
    """

    def __init__(self, job_id: str, cancel: Callable[[str], None]) -> None:
        self.id = job_id
        self._cancel = cancel
        self._events: deque[InferenceEvent] = deque()
        self._arrived = asyncio.Event()
        self._ended = False

    def events(self) -> Self:
        """The stream: an asynchronous iterator that ends after the terminal event."""
        return self

    def cancel(self) -> None:
        """Ask for its end; the stream still carries what comes until then."""
        self._cancel(self.id)

    def deliver(self, event: InferenceEvent) -> None:
        """Add an event; on the event loop's thread."""
        self._events.append(event)
        self._arrived.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> InferenceEvent:
        if self._ended:
            raise StopAsyncIteration
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        self._ended = event.terminal
        return event

    async def aclose(self) -> None:
        """Stop listening; the job is cancelled unless it has ended."""
        if not self._ended:
            self._ended = True
            self.cancel()
