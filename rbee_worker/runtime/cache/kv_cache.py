"""KVCache: the pool of keys and values, and SequenceCache: the blocks of one sequence.

The pool is one tensor. A sequence has a table of blocks (``block_pool.py``). Neighboring blocks form a run, and
attention reads a run in place, as one slice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.cache.block_pool import BLOCK_TOKENS, ROOT, BlockPool


class KVCache:
    """The pool: [layers, 2, kv_heads, positions, head_dim].

    On a CPU the memory is the process's only once it is written.

    Attributes:
        pool: which blocks are whose.
        positions: how many positions it holds.
        dtype: of keys and values.
    """

    def __init__(
        self, config: ModelConfig, positions: int, dtype: torch.dtype, device: torch.device, *, prefix_cache: bool
    ) -> None:
        blocks = blocks_for(positions)
        self.pool = BlockPool(blocks, prefix_cache=prefix_cache)
        self.positions = blocks * BLOCK_TOKENS
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, self.positions, config.head_dim)
        self.dtype = dtype
        self._data = torch.empty(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self._data.nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, each [kv_heads, positions, head_dim]."""
        return self._data[index, 0], self._data[index, 1]

    def write(self, index: int, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values [tokens, kv_heads, head_dim] at int64 positions of the pool [tokens].

        They are rounded to the pool's dtype.

        Returns:
            As :meth:`layer`.
        """
        all_keys, all_values = self.layer(index)
        all_keys.index_copy_(1, slots, keys.transpose(0, 1).to(self.dtype))
        all_values.index_copy_(1, slots, values.transpose(0, 1).to(self.dtype))
        return all_keys, all_values


@dataclass(frozen=True, slots=True)
class Rotation:
    """Which rows of the rotary tables rotate a sequence's keys.

    Attributes:
        start: the row of its first position.
        tokens: how long the sequence may get. Beyond that all its keys change. None: as long as there is room.
    """

    start: int = 0
    tokens: int | None = None


ROTATION = Rotation()


class SequenceCache:
    """One sequence's table of blocks.

    Attributes:
        rotation: of the keys in it.
        length: tokens whose keys and values are written and valid.
        reused: how many of them it found in the cache when it began.
    """

    __slots__ = ("_blocks", "_identity", "_known", "_pool", "_runs", "headroom", "length", "reused", "rotation")

    def __init__(
        self, pool: BlockPool, prefix: Sequence[int] = (), headroom: int = 0, rotation: Rotation = ROTATION
    ) -> None:
        """Begin with what is cached of ``prefix``. ``headroom``: by how many tokens the sequence will probably grow."""
        self.rotation = rotation
        self._pool = pool
        self._blocks: list[int] = []
        self._runs: list[tuple[int, int]] = []  # first block and number of neighbours
        blocks, identity = pool.match(prefix, ROOT - rotation.start)
        self._append(blocks)
        self._identity: int | None = identity
        self._known = len(self._blocks)
        self.length = self.reused = self._known * BLOCK_TOKENS
        self.headroom = headroom

    @property
    def blocks(self) -> tuple[int, ...]:
        """Its blocks, in order."""
        return tuple(self._blocks)

    @property
    def rows_left(self) -> float:
        """How many more tokens fit before all keys must be computed again with another rotation."""
        return math.inf if self.rotation.tokens is None else self.rotation.tokens - self.length

    def missing(self, tokens: int) -> int:
        """How many blocks must be allocated before ``tokens`` more fit."""
        return max(blocks_for(self.length + tokens) - len(self._blocks), 0)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more positions.

        Raises:
            CacheFull: there are not enough blocks; nothing is taken then.
        """
        missing = self.missing(tokens)
        if missing:
            # Right after a shared prefix too, where that is free: then the whole sequence is one run.
            last = self._blocks[-1] if self._blocks else None
            headroom = blocks_for(max(self.headroom - tokens, 0))
            self._append(self._pool.allocate(missing, last, headroom))

    def advance(self, tokens: Sequence[int], length: int) -> None:
        """Count the positions up to ``length`` as written and valid, and let full blocks be found.

        Args:
            tokens: the sequence's tokens, at least up to there.
            length: at most what was reserved.
        """
        self.length = length
        while self._identity is not None and (self._known + 1) * BLOCK_TOKENS <= length:
            begin = self._known * BLOCK_TOKENS
            held = tokens[begin : begin + BLOCK_TOKENS]
            self._identity = self._pool.register(self._blocks[self._known], self._identity, held)
            self._known += 1

    def release(self) -> None:
        """Release all blocks."""
        self._pool.release(self._blocks)
        self._blocks, self._runs = [], []
        self.length = 0

    def slots(self, count: int) -> list[int]:
        """Positions in the pool of the next ``count`` tokens; room must have been reserved."""
        return [
            self._blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
            for position in range(self.length, self.length + count)
        ]

    def runs(self, count: int) -> list[tuple[int, int]]:
        """Where in the pool it and ``count`` more tokens lie: pairs of a first position and the one after the last."""
        left = self.length + count
        runs = []
        for block, blocks in self._runs:
            if left <= 0:
                break
            begin, size = block * BLOCK_TOKENS, min(blocks * BLOCK_TOKENS, left)
            runs.append((begin, begin + size))
            left -= size
        return runs

    def _append(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if self._runs and sum(self._runs[-1]) == block:
                self._runs[-1] = (self._runs[-1][0], self._runs[-1][1] + 1)
            else:
                self._runs.append((block, 1))
        self._blocks += blocks


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)
