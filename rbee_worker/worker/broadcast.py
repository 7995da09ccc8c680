"""Broadcast of one load to any number of subscribers on the event loop."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from rbee_worker.events import LoadingEvent, LoadingToVram, Resolving, Stalled

_KEPT_EVENTS = 256


class LoadingBroadcast:
    """The latest state of a load, its recent events, and a wake-up for everyone who follows it.

    The events are kept once for all subscribers, the newest 256 of them: one who falls further behind misses
    intermediate counts, which are absolute, but never the terminal event, which is the last. Everything happens on the
    event loop's thread.

    Attributes:
        model: the model that was asked for, as it was named; empty before the first event.
        latest: the newest event; latest_counts: the newest ``loading_to_vram``.
        phase_seconds: seconds spent in each stage so far, ``stalled`` counted to the stage it interrupts.
        stalls: how often loading has stalled.
        subscribers: how many follow it now.
    """

    def __init__(self) -> None:
        self._events: deque[LoadingEvent] = deque(maxlen=_KEPT_EVENTS)
        self._published = 0
        self._phase = ""
        self._changed = asyncio.Event()
        self.model = ""
        self.latest: LoadingEvent | None = None
        self.latest_counts: LoadingToVram | None = None
        self.phase_seconds: dict[str, float] = {}
        self.stalls = 0
        self.subscribers = 0

    @property
    def ended(self) -> bool:
        """Whether the terminal event has come."""
        return self.latest is not None and self.latest.terminal

    def publish(self, event: LoadingEvent) -> None:
        """Take the next event and wake the subscribers."""
        self._events.append(event)
        self._published += 1
        if self.latest is not None:
            seconds = event.elapsed_seconds - self.latest.elapsed_seconds
            self.phase_seconds[self._phase] = self.phase_seconds.get(self._phase, 0.0) + seconds
        if isinstance(event, Stalled):
            self.stalls += 1
        else:
            self._phase = event.stage
        self.latest = event
        if isinstance(event, LoadingToVram):
            self.latest_counts = event
        elif isinstance(event, Resolving):
            self.model = event.model
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def subscribe(self) -> AsyncGenerator[LoadingEvent, None]:
        """The latest counts and state at once, then what follows, until the terminal event."""
        self.subscribers += 1
        try:
            seen = self._published
            counts, latest = self.latest_counts, self.latest
            if counts is not None and counts is not latest:
                yield counts
            if latest is not None:
                yield latest
            while not self.ended or seen < self._published:
                if seen == self._published:
                    await self._changed.wait()
                    continue
                oldest = self._published - len(self._events)
                event = self._events[max(seen, oldest) - oldest]
                seen = max(seen, oldest) + 1
                yield event
        finally:
            self.subscribers -= 1
