"""Which sequences run in the next step, and with how many tokens."""

from collections import deque
from dataclasses import dataclass

from rbee_worker.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's share of the next step: its next ``count`` pending tokens."""

    sequence: Sequence
    count: int


class Scheduler:
    """First come, first served into at most ``max_batch_size`` places.

    Sequences that only have their newest token pending run at every step. Prompts share ``prefill_chunk`` tokens a
    step in order of arrival, so that a long prompt slows the others down by a bounded amount and never stops them.
    """

    def __init__(self, max_batch_size: int, prefill_chunk: int) -> None:
        self._max_batch_size = max_batch_size
        self._prefill_chunk = prefill_chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def take_cancelled(self) -> list[Sequence]:
        """Remove and return what was cancelled, waiting or running."""
        cancelled = [sequence for sequence in (*self.running, *self.waiting) if sequence.cancelled]
        for sequence in cancelled:
            self.remove(sequence)
        return cancelled

    def admit(self) -> list[Sequence]:
        """Move waiting sequences into free places and return them."""
        admitted = []
        while self.waiting and len(self.running) < self._max_batch_size:
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def schedule(self) -> list[Scheduled]:
        """Shares of the next step, in order of arrival."""
        budget = self._prefill_chunk
        shares = []
        for sequence in self.running:
            count = sequence.pending
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count:
                shares.append(Scheduled(sequence, count))
        return shares

    def remove(self, sequence: Sequence) -> None:
        """Give a sequence's place free; nothing happens when it has none."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
