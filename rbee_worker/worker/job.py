"""Job: a submitted request and the stream of its events, for one consumer on the event loop."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Protocol, Self

from rbee_worker.config import GenerationRequest
from rbee_worker.events import End, InferenceEvent, InferenceFailed, Started, Token

submitted_jobs: ContextVar["list[Job] | None"] = ContextVar("submitted_jobs", default=None)
"""Where the jobs submitted in this context are noted, for whoever wants to tell what became of them."""


class Job:
    """The events of one request, in order, to the terminal one. Closing it before that cancels the job.

    Attributes:
        id: unique among running jobs.
        request: what was asked for.
        started: the event that told of its place in the batch; None before, and when it never got one.
        ended: the terminal event; None before.
        submitted_at, started_at, first_at, last_at, ended_at: ``time.monotonic()`` when it was submitted, and when its
            ``started``, its first and its newest text, and its terminal event reached the event loop; 0.0 before.
        texts: pieces of text so far, a token each or a few.
    """

    def __init__(self, job_id: str, cancel: Callable[[str], None], request: GenerationRequest) -> None:
        self.id = job_id
        self.request = request
        self.started: Started | None = None
        self.ended: End | InferenceFailed | None = None
        self.submitted_at = time.monotonic()
        self.started_at = self.first_at = self.last_at = self.ended_at = 0.0
        self.texts = 0
        self._cancel = cancel
        self._events: deque[InferenceEvent] = deque()
        self._arrived = asyncio.Event()
        self._closed = False

    def events(self) -> Self:
        """The stream: an asynchronous iterator that ends after the terminal event."""
        return self

    def cancel(self) -> None:
        """Ask for its end; the stream still carries what comes until then."""
        if self.ended is None:  # else its id may be another's by now
            self._cancel(self.id)

    def put(self, event: InferenceEvent, now: float) -> None:
        """Add an event that came at ``now``; on the event loop's thread."""
        if isinstance(event, Token):
            self.texts += 1
            self.first_at = self.first_at or now
            self.last_at = now
        elif isinstance(event, Started):
            self.started, self.started_at = event, now
        elif isinstance(event, End | InferenceFailed):
            self.ended, self.ended_at = event, now
        self._events.append(event)
        self._arrived.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> InferenceEvent:
        if self._closed:
            raise StopAsyncIteration
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        self._closed = event.terminal
        return event

    async def aclose(self) -> None:
        """Stop listening; the job is cancelled unless it has ended."""
        if not self._closed:
            self._closed = True
            self.cancel()


class JobObserver(Protocol):
    """Is told of jobs as their events reach the event loop, on its thread."""

    def stepped(self, gaps: list[float]) -> None:
        """A step brought text to jobs that had some before: the seconds since then, one entry a job."""

    def started(self, job: Job) -> None:
        """``job`` has its place in the batch."""

    def ended(self, job: Job) -> None:
        """``job`` has had its terminal event."""


def note_submitted(jobs: Iterable[Job]) -> None:
    """Tell the context that ``jobs`` are its own; see :data:`submitted_jobs`."""
    noted = submitted_jobs.get()
    if noted is not None:
        noted.extend(jobs)
