"""Scheduler: which sequences run in the next step, and how many tokens each of them brings."""

import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rbee_worker.runtime.cache.block_pool import BLOCK_TOKENS, CacheFull
from rbee_worker.runtime.cache.kv_cache import SequenceCache
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.engine.waiting import WaitingQueue

_SHARE_BESIDE_DECODING = 8
_SMALLEST_CHUNK = 16
_LIKELIHOODS_CHUNK = 64
"""Prompt tokens in one step whose log-probabilities are wanted. Each needs a row of logits over the vocabulary."""

_WORTH_WAITING = 4 * BLOCK_TOKENS
"""A new sequence waits when another one is computing at least this many tokens of the same prompt prefix."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's share of the next step: its next ``count`` pending tokens, and drafts of what may follow them."""

    sequence: Sequence
    cache: SequenceCache
    count: int
    drafts: tuple[int, ...] = ()


class Scheduler:
    """Runs at most ``max_batch_size`` sequences at a time over one KV cache.

    A sequence that decodes has one pending token, its newest, and runs in every step. Prompts share ``prefill_chunk``
    tokens a step: half goes to the one that has the least left, so that a short prompt behind a long one starts soon,
    and the rest is given in order of arrival, so that the long one never stands still. They get an eighth of that while
    other sequences decode, so a long prompt slows the others by a bounded amount.

    A sequence is admitted when the cache has room for its whole prompt. When the running sequences outgrow the cache,
    the one that arrived last is preempted: it loses its place and its blocks, and is computed again later. The one that
    arrived first always makes progress. A sequence that outgrows its rotary frequencies (LongRoPE) is computed again
    too.
    """

    def __init__(self, max_batch_size: int, prefill_chunk: int, *, prefix_cache: bool = True) -> None:
        """``prefix_cache``: one sequence can reuse what another one computes, so it may pay to wait for it."""
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
        """Remove and return the sequences that were cancelled, or whose deadline is before ``now``."""
        ended = [
            sequence for sequence in (*self.running, *self.waiting) if sequence.cancelled or now > sequence.deadline
        ]
        for sequence in ended:
            self.remove(sequence)
        return ended

    def admit(self, new_cache: Callable[[Sequence], SequenceCache]) -> Iterator[tuple[Sequence, SequenceCache]]:
        """Give free places to waiting sequences, as long as the cache has room for their prompts.

        Each is yielded with its blocks before the next one is looked at, so that whoever takes it owns them, whatever
        happens later.

        Args:
            new_cache: makes a sequence's table of blocks; it begins with the cached prefix of its prompt. When it
                raises, the sequence goes on waiting.
        """
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
            yield sequence, cache

    def schedule(self) -> list[Scheduled]:
        """The shares of the next step, in order of arrival. Room in the cache is reserved for each."""
        shares = []
        prefill = self._prefill_shares()
        for sequence in list(self.running):
            if sequence.cache is None:  # preempted for one that arrived before it
                continue
            if sequence.pending > sequence.cache.rows_left:
                self._preempt(sequence)
                continue
            count = prefill.get(sequence, 1)
            if not count:
                continue
            drafts = sequence.draft() if sequence.pending == 1 else ()
            if len(drafts) >= sequence.cache.rows_left:
                drafts = ()
            drafts = self._make_room(sequence, count, drafts)
            if sequence.cache is not None:
                shares.append(Scheduled(sequence, sequence.cache, count, drafts))
        return [share for share in shares if share.sequence.cache is not None]

    def _prefill_shares(self) -> dict[Sequence, int]:
        """How many tokens each prompt brings to the next step."""
        prompts = [sequence for sequence in self.running if sequence.pending > 1]
        shares = dict.fromkeys(prompts, 0)
        if not prompts:
            return shares
        budget, likelihoods = self._prefill_chunk, _LIKELIHOODS_CHUNK
        if len(prompts) < len(self.running):
            budget = min(budget, max(budget // _SHARE_BESIDE_DECODING, _SMALLEST_CHUNK))
        shortest = min(prompts, key=lambda sequence: sequence.pending)
        for sequence, most in ((shortest, budget // 2), *((prompt, budget) for prompt in prompts)):
            count = min(sequence.pending - shares[sequence], most, budget)
            if not sequence.shares_prefix:
                count = min(count, likelihoods)
                likelihoods -= count
            shares[sequence] += count
            budget -= count
        return shares

    def remove(self, sequence: Sequence) -> None:
        """Free a sequence's place; does nothing when it has none."""
        if not self.waiting.remove(sequence) and sequence in self.running:
            self.running.remove(sequence)

    def _make_room(self, sequence: Sequence, count: int, drafts: tuple[int, ...]) -> tuple[int, ...]:
        """Reserve cache for a share. Drafts that do not fit are dropped; later sequences are preempted where needed."""
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
        """The running sequence that will soon compute much of this one's prompt, and how many tokens they share."""
        if not (self._prefix_cache and sequence.shares_prefix):
            return None
        for other in self.running:
            if other.shares_prefix and other.pending > _WORTH_WAITING:
                common = _common_prefix(sequence.tokens, other.tokens)
                if min(other.pending, common - cached) >= _WORTH_WAITING and common > other.computed:
                    return other, common
        return None


def _is_at_it(other: Sequence, common: int) -> bool:
    """Whether the other sequence still computes the shared prefix. The prompts are not compared again."""
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
