"""Which sequences run in the next step, with how many tokens, and who holds which part of the KV cache."""

import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rbee_worker.runtime.cache.block_pool import BLOCK_TOKENS, CacheFull
from rbee_worker.runtime.cache.kv_cache import SequenceCache
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.engine.waiting import WaitingQueue

_SHARE_BESIDE_DECODING = 8
_SMALLEST_CHUNK = 16
_LIKELIHOODS_CHUNK = 64
"""Prompt tokens a step whose log-probabilities are wanted: each has a row of logits as wide as the vocabulary."""

_WORTH_WAITING = 4 * BLOCK_TOKENS
"""Prompt tokens that another sequence is just computing, for which a new one waits rather than compute them too."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's share of the next step: its next ``count`` pending tokens, and guesses at what follows them."""

    sequence: Sequence
    cache: SequenceCache
    count: int
    drafts: tuple[int, ...] = ()


class Scheduler:
    """At most ``max_batch_size`` sequences, over one KV cache.

    Sequences that only have their newest token pending run at every step. Prompts share ``prefill_chunk`` tokens a step
    in order of arrival, an eighth of it while others decode, so that a long prompt slows them by a bounded amount.

    A sequence gets its place together with the cache for its whole prompt. When running ones outgrow the cache, the one
    that came last gives its place and its blocks up, and is computed again later: what came first always moves on. One
    that outgrows its rotary frequencies (LongRoPE) is computed again as well.
    """

    def __init__(self, max_batch_size: int, prefill_chunk: int, *, prefix_cache: bool = True) -> None:
        """``prefix_cache``: what one sequence computes can be reused by others, so that waiting for it may pay."""
        self._max_batch_size = max_batch_size
        self._prefill_chunk = prefill_chunk
        self._prefix_cache = prefix_cache
        self._arrivals = 0
        self._awaiting: dict[Sequence, tuple[Sequence, int]] = {}
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # by arrival
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        self.waiting.add(sequence)

    def take_ended(self, now: float) -> list[Sequence]:
        """Remove and return what was cancelled or has run out of time by ``now``, waiting or running."""
        ended = [
            sequence for sequence in (*self.running, *self.waiting) if sequence.cancelled or now > sequence.deadline
        ]
        for sequence in ended:
            self.remove(sequence)
        return ended

    def admit(self, new_cache: Callable[[Sequence], SequenceCache]) -> list[tuple[Sequence, SequenceCache]]:
        """Move waiting sequences into free places, as far as the cache has room for their prompts.

        Args:
            new_cache: makes a sequence's table, which begins with what is cached of its prompt.
        """
        admitted: list[tuple[Sequence, SequenceCache]] = []
        running = Counter(sequence.client for sequence in self.running)
        awaited, self._awaiting = self._awaiting, {}
        for sequence in self.waiting.in_turn(running):
            if len(self.running) >= self._max_batch_size:
                break
            if sequence in awaited and _is_at_it(*awaited[sequence]):
                self._awaiting[sequence] = awaited[sequence]
                continue
            cache = new_cache(sequence)
            if (found := self._computing(sequence, cache.length)) is not None:
                self._awaiting[sequence] = found
                cache.release()
                continue
            try:
                cache.reserve(len(sequence.tokens) - cache.length + 1)
            except CacheFull:
                cache.release()
                break
            self.waiting.remove(sequence)
            bisect.insort(self.running, sequence, key=lambda other: other.arrival)
            admitted.append((sequence, cache))
        return admitted

    def schedule(self) -> list[Scheduled]:
        """Shares of the next step, in order of arrival, with room in the cache for each."""
        decoding = any(sequence.pending == 1 for sequence in self.running)
        budget, likelihoods = self._prefill_chunk, _LIKELIHOODS_CHUNK
        if decoding:
            budget = min(budget, max(budget // _SHARE_BESIDE_DECODING, _SMALLEST_CHUNK))
        shares = []
        for sequence in list(self.running):
            if sequence.cache is None:  # gave its place up to one before it
                continue
            count = sequence.pending
            if count > sequence.cache.rows_left:
                self._preempt(sequence)
                continue
            if count > 1:
                count = min(count, budget)
                if not sequence.shares_prefix:
                    count = min(count, likelihoods)
                    likelihoods -= count
                budget -= count
            if not count:
                continue
            drafts = sequence.draft() if sequence.pending == 1 else ()
            if len(drafts) >= sequence.cache.rows_left:
                drafts = ()
            drafts = self._make_room(sequence, count, drafts)
            if sequence.cache is not None:
                shares.append(Scheduled(sequence, sequence.cache, count, drafts))
        return [share for share in shares if share.sequence.cache is not None]

    def remove(self, sequence: Sequence) -> None:
        """Give a sequence's place free; nothing happens when it has none."""
        if not self.waiting.remove(sequence) and sequence in self.running:
            self.running.remove(sequence)

    def _make_room(self, sequence: Sequence, count: int, drafts: tuple[int, ...]) -> tuple[int, ...]:
        """Reserve the cache of a share, without its drafts where they do not fit, at the cost of later sequences."""
        while sequence.cache is not None:
            try:
                sequence.cache.reserve(count + len(drafts))
            except CacheFull:
                if drafts:
                    drafts = ()
                else:
                    self._preempt(self.running[-1])
            else:
                break
        return drafts

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        sequence.preempt()
        self.waiting.add_back(sequence)

    def _computing(self, sequence: Sequence, cached: int) -> tuple[Sequence, int] | None:
        """The running sequence that is about to compute a good part of this one's prompt, and how much they share."""
        if not (self._prefix_cache and sequence.shares_prefix):
            return None
        for other in self.running:
            if other.shares_prefix and other.pending > _WORTH_WAITING:
                common = _common_prefix(sequence.tokens, other.tokens)
                if min(other.pending, common - cached) >= _WORTH_WAITING and common > other.computed:
                    return other, common
        return None


def _is_at_it(other: Sequence, common: int) -> bool:
    """Whether a sequence that was found to compute what another waits for still does, without comparing them again."""
    return other.cache is not None and min(other.pending - 1, common - other.computed) >= _WORTH_WAITING


def _common_prefix(one: list[int], other: list[int]) -> int:
    """Length of the longest common beginning, in whole blocks."""
    low, high = 0, min(len(one), len(other)) // BLOCK_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        begin, end = low * BLOCK_TOKENS, middle * BLOCK_TOKENS
        if one[begin:end] == other[begin:end]:
            low = middle
        else:
            high = middle - 1
    return low * BLOCK_TOKENS
