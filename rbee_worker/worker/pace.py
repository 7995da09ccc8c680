"""Pace: how soon a full queue is likely to have room, from the jobs that run and how long others ran before."""

import math
import time
from collections import deque

from rbee_worker.worker.job import Job

_REMEMBERED = 32
_LONGEST = 60


class Pace:
    """Observes jobs, on the event loop; any thread may ask."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._running: dict[str, Job] = {}

    def stepped(self, gaps: list[float]) -> None:
        """Nothing to note."""

    def started(self, job: Job) -> None:
        """Note that it runs."""
        self._running[job.id] = job

    def ended(self, job: Job) -> None:
        """Note how long it ran; jobs that never did say nothing."""
        if self._running.pop(job.id, None) is not None:
            self._seconds.append(job.ended_at - job.started_at)

    def seconds_to_room(self, now: float | None = None) -> int:
        """Whole seconds, 1 to 60, until the first of those that run is likely to have ended."""
        running = list(self._running.values())
        if not running:
            return 1
        now = time.monotonic() if now is None else now
        return min(max(math.ceil(min(self._left(job, now) for job in running)), 1), _LONGEST)

    def _left(self, job: Job, now: float) -> float:
        """Seconds that a job is likely to run on: to its last token at the rate it has, where that is known.

        Else to the mean of the latest 32, and as long again as it has run when that is over.
        """
        most = job.request.sampling.max_tokens
        if most is not None and job.texts > 1:
            return (most - job.texts) * (job.last_at - job.first_at) / (job.texts - 1)
        elapsed = now - job.started_at
        ended = list(self._seconds)
        mean = sum(ended) / len(ended) if ended else 0.0
        return mean - elapsed if mean > elapsed else elapsed
