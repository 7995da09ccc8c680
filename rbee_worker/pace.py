"""Pace: how soon a full queue is likely to have room, from how long jobs have run lately."""

import math
import time
from collections import deque

from rbee_worker.job import Job

_REMEMBERED = 32
_LONGEST = 60


class Pace:
    """Observes jobs, on the event loop; any thread may ask."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._running: dict[str, float] = {}

    def stepped(self, gaps: list[float]) -> None:
        """Nothing to note."""

    def started(self, job: Job) -> None:
        """Note when its run began."""
        self._running[job.id] = job.started_at

    def ended(self, job: Job) -> None:
        """Note how long it ran; jobs that never did say nothing."""
        began = self._running.pop(job.id, None)
        if began is not None:
            self._seconds.append(job.ended_at - began)

    def seconds_to_room(self, now: float | None = None) -> int:
        """Whole seconds, 1 to 60, until one of those that run is likely to have ended.

        That is the mean time that the latest 32 jobs ran, shared among those that run side by side. Until one has
        ended it is the time that the eldest has run.
        """
        running = list(self._running.values())
        if not running:
            return 1
        ended = list(self._seconds)
        eldest = (time.monotonic() if now is None else now) - min(running)
        seconds = sum(ended) / len(ended) / len(running) if ended else eldest
        return min(max(math.ceil(seconds), 1), _LONGEST)
