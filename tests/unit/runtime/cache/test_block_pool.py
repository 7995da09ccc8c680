"""The pool of blocks: whatever is asked of it, nothing is lost, shared by two writers, or found where it is not."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rbee_worker.runtime.cache.block_pool import BLOCK_TOKENS, ROOT, BlockPool, CacheFull, PoolUse
from rbee_worker.runtime.cache.kv_cache import SequenceCache

BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Sequences of two kinds of token come, grow, share and go; what each position holds is written down beside."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.live: list[tuple[SequenceCache, list[int]]] = []
        self.held: dict[int, int] = {}

    @rule(target=sequences, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5 * BLOCK_TOKENS))
    def come(self, tokens: list[int]) -> tuple[SequenceCache, list[int]]:
        # Long alike beginnings, so that prefixes are found.
        tokens = [tokens[0]] * (len(tokens) // 2) + tokens
        cache = SequenceCache(self.pool, tokens[:-1])
        sequence = (cache, list(tokens))
        assert cache.reused <= len(tokens) - 1
        for position in range(cache.reused):
            slot = cache.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
            assert self.held[slot] == tokens[position], "a prefix was found that is not there"
        self.live.append(sequence)
        self.write(sequence)
        return sequence

    @rule(sequence=sequences, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=40))
    def grow(self, sequence: tuple[SequenceCache, list[int]], tokens: list[int]) -> None:
        if sequence in self.live:
            sequence[1].extend(tokens)
            self.write(sequence)

    @rule(sequence=consumes(sequences))
    def go(self, sequence: tuple[SequenceCache, list[int]]) -> None:
        if sequence in self.live:
            self.live.remove(sequence)
            sequence[0].release()

    def write(self, sequence: tuple[SequenceCache, list[int]]) -> None:
        cache, tokens = sequence
        count = len(tokens) - cache.length
        available = self.pool.available
        missing = cache.missing(count)
        try:
            cache.reserve(count)
        except CacheFull:
            assert missing > available
            assert self.pool.available == available
            self.live.remove(sequence)
            cache.release()
            return
        assert self.pool.available == available - missing
        for slot, token in zip(cache.slots(count), tokens[cache.length :], strict=True):
            assert self.pool._users[slot // BLOCK_TOKENS] == 1, "two sequences write one block"
            self.held[slot] = token
        cache.advance(tokens, len(tokens))

    @invariant()
    def accounting_equals_reality(self) -> None:
        users = [0] * BLOCKS
        for cache, _ in self.live:
            assert len(set(cache.blocks)) == len(cache.blocks)
            for block in cache.blocks:
                users[block] += 1
        assert [self.pool._users[block] for block in range(BLOCKS)] == users
        use = self.pool.use
        assert use.used == sum(count > 0 for count in users)
        assert use.free + use.used + use.cached == BLOCKS
        assert self.pool.available == use.free + use.cached

    @invariant()
    def every_sequence_finds_what_it_wrote(self) -> None:
        for cache, tokens in self.live:
            positions = [slot for begin, end in cache.runs(0) for slot in range(begin, end)]
            assert [self.held[slot] for slot in positions] == tokens


PoolMachine.TestCase.settings = settings(stateful_step_count=40)
TestPool = PoolMachine.TestCase


def test_neighbours_are_given_where_there_are_any() -> None:
    pool = BlockPool(64)
    one, other = SequenceCache(pool), SequenceCache(pool)
    for _ in range(20):
        one.reserve(BLOCK_TOKENS)
        other.reserve(BLOCK_TOKENS)
        one.length += BLOCK_TOKENS
        other.length += BLOCK_TOKENS
    assert len(one.runs(0)) == len(other.runs(0)) == 1


def test_what_was_used_longest_ago_goes_first() -> None:
    pool = BlockPool(4)
    prompts = [[number] * BLOCK_TOKENS for number in range(4)]
    for prompt in prompts:
        cache = SequenceCache(pool)
        cache.reserve(BLOCK_TOKENS)
        cache.advance(prompt, BLOCK_TOKENS)
        cache.release()
    assert pool.use == PoolUse(free=0, used=0, cached=4)
    SequenceCache(pool, prompts[0]).release()
    held = pool.allocate(2, None)
    pool.release(held)
    found = [bool(pool.match(prompt)[0]) for prompt in prompts]
    assert found == [True, False, False, True]


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    pool = BlockPool(4)
    prompt = list(range(4 * BLOCK_TOKENS))
    cache = SequenceCache(pool)
    cache.reserve(len(prompt))
    cache.advance(prompt, len(prompt))
    cache.release()
    pool.release(pool.allocate(1, None))
    assert len(pool.match(prompt)[0]) == 3


@pytest.mark.parametrize("first_ends", [True, False], ids=["one after the other", "side by side"])
def test_what_follows_a_block_that_was_computed_twice_is_found(first_ends: bool) -> None:
    pool = BlockPool(12)
    prompt = list(range(2 * BLOCK_TOKENS))
    caches = []
    for answer in (100, 200):
        # Its last token is always computed, and with it here the whole last block of the prompt.
        cache = SequenceCache(pool, prompt[:-1])
        tokens = prompt + [answer] * 2 * BLOCK_TOKENS
        cache.reserve(len(tokens) - cache.length)
        cache.advance(tokens, len(tokens))
        caches.append((cache, tokens))
        if first_ends:
            cache.release()
    for cache, tokens in caches:
        if not first_ends:
            cache.release()
        again = SequenceCache(pool, tokens)
        assert again.reused == len(tokens)
        again.release()
    assert pool.use == PoolUse(free=6, used=0, cached=6)
    # Of the second, which was used last, the beginning goes last.
    pool.release(pool.allocate(9, None))
    assert SequenceCache(pool, caches[1][1]).reused == 3 * BLOCK_TOKENS


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    pool = BlockPool(2, prefix_cache=False)
    cache = SequenceCache(pool)
    cache.reserve(BLOCK_TOKENS)
    cache.advance([1] * BLOCK_TOKENS, BLOCK_TOKENS)
    cache.release()
    assert pool.use == PoolUse(free=2, used=0, cached=0)
    assert pool.match([1] * BLOCK_TOKENS) == ([], ROOT)


def test_more_than_there_is_takes_nothing() -> None:
    pool = BlockPool(2)
    with pytest.raises(CacheFull, match="3 blocks asked for, 2 available"):
        pool.allocate(3, None)
    assert pool.use.free == 2
