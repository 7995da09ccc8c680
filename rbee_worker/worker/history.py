"""What the last loads came to, newest first."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from rbee_worker.events import LoadingEvent

KEPT_LOADS = 16


@dataclass(frozen=True, slots=True)
class PastLoad:
    """A load that has ended.

    Attributes:
        model: the model that was asked for, as it was named.
        began: when, in UTC.
        end: its terminal event.
    """

    model: str
    began: datetime
    end: LoadingEvent

    @property
    def started_at(self) -> str:
        """When it began: RFC 3339 with milliseconds."""
        return self.began.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class LoadHistory:
    """The newest :data:`KEPT_LOADS` loads that have ended. Iterating gives the newest first.

    Everything happens on the event loop's thread.
    """

    def __init__(self) -> None:
        self._loads: deque[PastLoad] = deque(maxlen=KEPT_LOADS)

    def add(self, load: PastLoad) -> None:
        """Take a load that has ended. The oldest one is forgotten where there are too many."""
        self._loads.appendleft(load)

    def __iter__(self) -> Iterator[PastLoad]:
        return iter(self._loads)
