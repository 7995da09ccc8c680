"""BlockPool: who owns which block of the KV cache. Allocation, sharing and reuse; no tensors.

A block holds the keys and values of :data:`BLOCK_TOKENS` positions. It is in one of three states:

- free: nobody uses it, and its content is worth nothing;
- in use: by one or more sequences. Only the one that allocated it writes to it, and only until it is full;
- cached: nobody uses it, but its content may be reused (prefix cache). When no free block is left, cached blocks are
  evicted, the least recently used first.

A full block is found by its content: its own tokens, after those of the block before. Tokens are compared, not only
their hash.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_TOKENS = 16
"""Positions per block; also the granularity of prefix reuse."""

_GOOD_GAP = 32
"""A row of this many free blocks is worth evicting cached ones."""

_Key = tuple[int, tuple[int, ...]]
"""Identity of the content before (0: nothing), and the block's own tokens."""

ROOT = 0
"""Identity of the empty prefix."""


class CacheFull(Exception):
    """Fewer blocks are free or cached than were asked for."""


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Blocks by state; they add up to all there are."""

    free: int
    used: int
    cached: int


class BlockPool:
    """Blocks numbered from 0.

    The blocks of a sequence lie side by side where that is possible, since attention reads a row of neighbors at once.

    Args:
        blocks: how many there are.
        prefix_cache: keep full blocks for reuse when nobody uses them any more.
    """

    def __init__(self, blocks: int, *, prefix_cache: bool = True) -> None:
        self.blocks = blocks
        self._prefix_cache = prefix_cache
        self._users = [0] * blocks
        self._free = np.ones(blocks, dtype=np.bool_)
        self._free_count = blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._key_of: dict[int, _Key] = {}
        self._block_of: dict[_Key, int] = {}
        self._identity_of: dict[int, int] = {}
        self._next_identity = ROOT + 1

    @property
    def available(self) -> int:
        """Blocks that can be allocated now."""
        return self._free_count + len(self._cached)

    @property
    def use(self) -> PoolUse:
        """Blocks by state."""
        return PoolUse(self._free_count, self.blocks - self.available, len(self._cached))

    def allocate(self, count: int, after: int | None, headroom: int = 0) -> list[int]:
        """Take blocks for a sequence.

        Args:
            count: how many.
            after: the sequence's last block; the new ones should lie right after it. None: it has none.
            headroom: how many more blocks it will probably ask for.

        Raises:
            CacheFull: there are not that many. Nothing is taken then.
        """
        if count > self.available:
            raise CacheFull(f"{count} blocks asked for, {self.available} available")
        taken: list[int] = []
        while len(taken) < count:
            following = None if after is None else after + 1
            if following is None or following >= self.blocks or not self._free[following]:
                following = self._place(count - len(taken) + headroom)
            self._take(following)
            taken.append(following)
            after = following
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Release a sequence's blocks, given in its order. Full blocks that can be found stay cached."""
        # From the end, so that a block is always evicted before the one that it continues.
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free[block] = True
                self._free_count += 1

    def match(self, tokens: Sequence[int], root: int = ROOT) -> tuple[list[int], int]:
        """Find the longest known prefix of ``tokens``, in whole blocks, and share its blocks.

        Args:
            tokens: a sequence's.
            root: identity of what is before them. Content with another root is other content.

        Returns:
            The blocks, now in use by one more sequence, and the identity of the content up to there.
        """
        blocks, identity = [], root
        for begin in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            block = self._block_of.get((identity, tuple(tokens[begin : begin + BLOCK_TOKENS])))
            if block is None:
                break
            blocks.append(block)
            identity = self._identity_of[block]
        for block in blocks:
            self._cached.pop(block, None)
            self._users[block] += 1
        return blocks, identity

    def register(self, block: int, before: int, tokens: Sequence[int]) -> int | None:
        """Make a full block findable.

        Args:
            block: in use, and written to its end.
            before: identity of the content before it.
            tokens: the :data:`BLOCK_TOKENS` it holds.

        Returns:
            Identity of the content up to its end; None when nothing is kept. When another block holds the same and
            somebody uses it, that one stays the one that is found. Otherwise this one replaces it.
        """
        if not self._prefix_cache:
            return None
        key = (before, tuple(tokens))
        same = self._block_of.get(key)
        if same is None:
            identity, self._next_identity = self._next_identity, self._next_identity + 1
        else:
            identity = self._identity_of[same]
            if same not in self._cached:
                return identity
            # This block is evicted after the blocks that continue it, like the others of its sequence.
            del self._cached[same]
            self._forget(same)
        self._key_of[block], self._block_of[key], self._identity_of[block] = key, block, identity
        return identity

    def _take(self, block: int) -> None:
        self._free[block] = False
        self._free_count -= 1
        self._users[block] = 1

    def _place(self, wanted: int) -> int:
        """A free block with room after it; cached blocks are evicted when there is none."""
        start, length = self._largest_gap()
        enough, spared = min(wanted, _GOOD_GAP), self.blocks // 8
        while self._cached and (length == 0 or (length < enough and spared > 0)):
            # Blocks that were released together are evicted together, and mostly lie together, so gaps grow.
            for _ in range(min(len(self._cached), enough, max(spared, 1))):
                self._evict()
                spared -= 1
            start, length = self._largest_gap()
        if start == 0 or length < 2 * wanted:
            return start
        # In the middle of a large gap, so that the sequence before it can grow too.
        return start + length // 2

    def _largest_gap(self) -> tuple[int, int]:
        """First block and length of the longest row of free ones; (0, 0): none is free."""
        if not self._free_count:
            return 0, 0
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        lengths = ends - starts
        best = int(lengths.argmax())
        return int(starts[best]), int(lengths[best])

    def _evict(self) -> None:
        self._forget(self._cached.popitem(last=False)[0])

    def _forget(self, block: int) -> None:
        """Free a block that was cached."""
        del self._block_of[self._key_of.pop(block)], self._identity_of[block]
        self._free[block] = True
        self._free_count += 1
