"""The frames of the worker's own streams: the events of a job, and those of a load."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from rbee_worker.errors import RbeeError
from rbee_worker.events import LoadFailed, LoadingEvent, to_dict
from rbee_worker.server.sse import Frames, frame
from rbee_worker.server.words import in_words
from rbee_worker.worker.job import Job

_CUT_SHORT = "The stream ended before its result."


async def inference_frames(job: Job) -> Frames:
    """The events of a job, a frame for each. Closing this before the terminal event cancels the job.

    Raises:
        RbeeError: the events ended without a terminal one.
    """
    async with aclosing(job.events()) as events:
        async for event in events:
            yield frame(to_dict(event))
            if event.terminal:
                return
    raise RbeeError(_CUT_SHORT)


class SharedFrames:
    """Encodes each event of a load once, for all the streams that carry it.

    The key of an event is its ``id()``. The last ``size`` events are kept alive, so that their ids are not used again.
    """

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._frames: dict[int, tuple[LoadingEvent, bytes]] = {}

    def __call__(self, event: LoadingEvent) -> bytes:
        """The frame of an event."""
        known = self._frames.get(id(event))
        if known is not None:
            return known[1]
        encoded = frame(to_dict(event))
        self._frames[id(event)] = (event, encoded)
        if len(self._frames) > self._size:
            del self._frames[next(iter(self._frames))]
        return encoded


class Watcher:
    """One client that watches a load.

    Args:
        events: the events, from the latest state on.
        encode: makes the frames; shared by all watchers.
    """

    def __init__(self, events: AsyncGenerator[LoadingEvent, None], encode: SharedFrames) -> None:
        self._events = events
        self._encode = encode
        self._last: LoadingEvent | None = None

    async def frames(self) -> Frames:
        """The events of the load, a frame for each.

        Raises:
            RbeeError: the events ended without a terminal one.
        """
        async with aclosing(self._events) as events:
            async for event in events:
                self._last = event
                yield self._encode(event)
                if event.terminal:
                    return
        raise RbeeError(_CUT_SHORT)

    def failed(self, error: RbeeError) -> bytes:
        """The terminal frame when the stream fails. Its ``seq`` follows that of the last event sent."""
        seq, elapsed = (self._last.seq + 1, self._last.elapsed_seconds) if self._last is not None else (0, 0.0)
        return frame(to_dict(LoadFailed(seq=seq, elapsed_seconds=elapsed, code=error.code, message=in_words(error))))
