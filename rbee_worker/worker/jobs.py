"""Jobs: every job that has been submitted and has not ended."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from operator import methodcaller

from rbee_worker.errors import Conflict, FieldError, InferenceError, InvalidRequest, QueueFull
from rbee_worker.events import InferenceEvent, InferenceFailed, Started, Token
from rbee_worker.worker.job import Job, JobObserver
from rbee_worker.worker.pace import Pace

logger = logging.getLogger(__name__)


class Jobs:
    """The register of jobs: filled from any thread, emptied on the event loop.

    Attributes:
        capacity: jobs that can run and wait at a time.
        observers: told of the jobs as their events arrive.
        running: jobs with a place in the batch, as the engine said with the latest events.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.running = 0
        self._ended = asyncio.Event()
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._pace = Pace()
        self.observers: list[JobObserver] = [self._pace]

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def __iter__(self) -> Iterator[str]:
        """The ids there are now."""
        return iter(list(self._jobs))

    @property
    def queued(self) -> int:
        """Jobs waiting for one, also those that the engine has not seen yet."""
        return max(len(self._jobs) - self.running, 0)

    def check_room(self, count: int) -> None:
        """Refuse ``count`` more jobs that find no room.

        Raises:
            InvalidRequest: they never will.
            QueueFull: not now.
        """
        if count > self.capacity:
            problem = f"The request makes {count} jobs; this worker runs and queues {self.capacity} at most."
            raise InvalidRequest(problem, fields=[FieldError("n", f"at most {self.capacity} jobs", problem)])
        if len(self._jobs) + count > self.capacity:
            seconds = self._pace.seconds_to_room()
            problem = f"The queue is full: {self.running} running, {self.queued} waiting, {self.capacity} at most."
            raise QueueFull(problem, retry_after=seconds)

    def register(self, jobs: list[Job]) -> None:
        """Take jobs in, all of them or none.

        Raises:
            Conflict: the id of one is taken, or two have the same.
            InvalidRequest, QueueFull: as :meth:`check_room`.
        """
        with self._lock:
            new: dict[str, Job] = {}
            for job in jobs:
                if job.id in self._jobs or job.id in new:
                    raise Conflict(f"Job {job.id} is running already.")
                new[job.id] = job
            self.check_room(len(jobs))
            self._jobs.update(new)

    def deliver(self, events: Iterable[tuple[str, InferenceEvent]], running: int) -> None:
        """Give the events of one step to their jobs, and tell the observers; on the event loop.

        Args:
            events: each with the id of its job; those of jobs that are not here are dropped.
            running: jobs that have a place in the batch after it.
        """
        ended = self._hand_out(events)
        with self._lock:
            self.running = running
            for job_id in ended:
                del self._jobs[job_id]
        if ended:
            waited_for, self._ended = self._ended, asyncio.Event()
            waited_for.set()

    def fail_all(self, message: str) -> None:
        """End every job with an error; on the event loop."""
        failure = InferenceFailed(code=InferenceError.code, message=message)
        self.deliver([(job_id, failure) for job_id in self], 0)

    async def wait_until_none(self, seconds: float) -> None:
        """Return when every job has ended, or after ``seconds``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._jobs:
                    await self._ended.wait()

    def _hand_out(self, events: Iterable[tuple[str, InferenceEvent]]) -> list[str]:
        """Put each event into its job, and tell the observers; returns the ids of the jobs that have ended."""
        now = time.monotonic()
        gaps: list[float] = []
        ended: list[str] = []
        for job_id, event in events:
            job = self._jobs.get(job_id)
            if job is None:
                continue
            # Several tokens of one step arrive together: that is one gap.
            if isinstance(event, Token) and job.last_at and job.last_at != now:
                gaps.append(now - job.last_at)
            job.put(event, now)
            if isinstance(event, Started):
                self._tell(methodcaller("started", job))
            elif event.terminal:
                ended.append(job_id)
                self._tell(methodcaller("ended", job))
        if gaps:
            self._tell(methodcaller("stepped", gaps))
        return ended

    def _tell(self, tell: Callable[[JobObserver], object]) -> None:
        """Tell every observer. One that fails costs nobody else their events."""
        for observer in self.observers:
            try:
                tell(observer)
            except Exception:
                logger.exception("an observer of jobs failed: %s", type(observer).__name__)
