"""Both forms of attention against a plain float64 one, over caches that lie in one run, in many, and shared."""

import math

import pytest
import torch
from torch import Tensor

from rbee_worker.runtime.attention import GatherAttention, RunAttention, Segment
from rbee_worker.runtime.block_pool import BLOCK_TOKENS, BlockPool
from rbee_worker.runtime.kv_cache import SequenceCache

HEADS, DIM, BLOCKS = 6, 16, 128
CPU = torch.device("cpu")


def scattered_pool(step: int) -> BlockPool:
    """A pool of which only every ``step``-th block is free."""
    pool = BlockPool(BLOCKS)
    taken = pool.allocate(BLOCKS, None)
    for block in taken[::step]:
        pool.release([block])
    return pool


def exact(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Of one sequence: queries [tokens, heads, dim], keys and values [kv_heads, positions, dim]."""
    before = keys.shape[1] - queries.shape[0]
    out = torch.zeros(queries.shape, dtype=torch.float64)
    for token in range(queries.shape[0]):
        seen = before + token + 1
        for head in range(HEADS):
            shared = head // (HEADS // keys.shape[0])
            scores = keys[shared, :seen].double() @ queries[token, head].double() / math.sqrt(DIM)
            out[token, head] = scores.softmax(0) @ values[shared, :seen].double()
    return out.flatten(1)


def positions_of(segment: Segment) -> Tensor:
    return torch.cat([torch.arange(*run) for run in segment.cache.runs(segment.count)])


def check(segments: list[Segment], kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(len(segments))
    tokens = sum(segment.count for segment in segments)
    queries = torch.randn(tokens, HEADS, DIM, generator=generator)
    keys, values = torch.randn(2, kv_heads, BLOCKS * BLOCK_TOKENS, DIM, generator=generator)
    expected = torch.cat(
        [
            exact(
                queries[segment.start : segment.start + segment.count],
                keys[:, positions_of(segment)],
                values[:, positions_of(segment)],
            )
            for segment in segments
        ]
    )
    for attention in (RunAttention(segments, torch.float32), GatherAttention(segments, CPU)):
        torch.testing.assert_close(attention(queries, keys, values).double(), expected, atol=1e-5, rtol=0)


def cache_of(pool: BlockPool, length: int, more: int) -> SequenceCache:
    cache = SequenceCache(pool)
    cache.reserve(length + more)
    cache.length = length
    return cache


@pytest.mark.parametrize("step", [1, 2, 5], ids=["one run", "runs of a block", "far apart"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("tokens", "before"), [(1, 0), (1, 37), (5, 0), (5, 40), (200, 0), (150, 61)])
def test_every_query_sees_its_past_and_itself(tokens: int, before: int, kv_heads: int, step: int) -> None:
    pool = scattered_pool(step)
    check([Segment(cache_of(pool, before, tokens), 0, tokens)], kv_heads)


@pytest.mark.parametrize("step", [1, 3])
def test_a_ragged_batch_is_its_sequences(step: int) -> None:
    pool = scattered_pool(step)
    segments, start = [], 0
    for before, tokens in ((37, 1), (0, 9), (16, 1), (48, 130), (5, 1)):
        segments.append(Segment(cache_of(pool, before, tokens), start, tokens))
        start += tokens
    check(segments, 2)


def test_sequences_that_share_a_prefix_read_it_together() -> None:
    pool = BlockPool(BLOCKS)
    prompt = list(range(3 * BLOCK_TOKENS))
    first = SequenceCache(pool)
    first.reserve(len(prompt) + 1)
    first.advance(prompt, len(prompt))
    others = [SequenceCache(pool, prompt) for _ in range(3)]
    for cache in others:
        assert cache.reused == len(prompt)
        cache.reserve(20)
        cache.length += 7
    segments = [Segment(cache, row, 1) for row, cache in enumerate((first, *others))]
    attention = RunAttention(segments, torch.float32)
    shared = [piece for piece in attention._parts if isinstance(piece.rows, Tensor) and len(piece.rows) > 1]
    assert [(len(piece.rows), piece.end - piece.begin) for piece in shared] == [(3, len(prompt))]
    check(segments, 2)


def test_sixteen_bits_stay_close() -> None:
    pool = scattered_pool(2)
    segment = Segment(cache_of(pool, 40, 9), 0, 9)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(9, HEADS, DIM, generator=generator).bfloat16()
    keys, values = torch.randn(2, 2, BLOCKS * BLOCK_TOKENS, DIM, generator=generator).bfloat16()
    runs = RunAttention([segment], torch.bfloat16)(queries, keys, values)
    assert runs.dtype == torch.bfloat16
    torch.testing.assert_close(runs, GatherAttention([segment], CPU)(queries, keys, values), atol=2e-2, rtol=2e-2)
