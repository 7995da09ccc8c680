"""Both forms of attention against a plain float64 one, over caches that lie in one run, in many, and shared."""

import pytest
import torch
from torch import Tensor

from rbee_worker.runtime.cache.block_pool import BLOCK_TOKENS, BlockPool
from rbee_worker.runtime.cache.kv_cache import SequenceCache
from rbee_worker.runtime.model.attention import PLAIN, GatherAttention, RunAttention, Scores, Segment

HEADS, DIM, BLOCKS = 6, 16, 128
CPU = torch.device("cpu")


def scattered_pool(step: int) -> BlockPool:
    """A pool of which only every ``step``-th block is free."""
    pool = BlockPool(BLOCKS)
    taken = pool.allocate(BLOCKS, None)
    for block in taken[::step]:
        pool.release([block])
    return pool


def exact(queries: Tensor, keys: Tensor, values: Tensor, ways: Scores) -> Tensor:
    """Of one sequence: queries [tokens, heads, dim], keys and values [kv_heads, positions, dim]."""
    before = keys.shape[1] - queries.shape[0]
    out = torch.zeros(queries.shape, dtype=torch.float64)
    for token in range(queries.shape[0]):
        seen = before + token + 1
        first = 0 if ways.window is None else max(seen - ways.window, 0)
        for head in range(HEADS):
            shared = head // (HEADS // keys.shape[0])
            scores = keys[shared, first:seen].double() @ queries[token, head].double() * (ways.scale or DIM**-0.5)
            if ways.softcap is not None:
                scores = ways.softcap * (scores / ways.softcap).tanh()
            sink = float("-inf") if ways.sinks is None else float(ways.sinks[head])
            shares = torch.cat([scores, torch.tensor([sink], dtype=torch.float64)]).softmax(0)[:-1]
            out[token, head] = shares @ values[shared, first:seen].double()
    return out.flatten(1)


def positions_of(segment: Segment) -> Tensor:
    return torch.cat([torch.arange(*run) for run in segment.cache.runs(segment.count)])


def check(segments: list[Segment], kv_heads: int, *ways: Scores, cached: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(len(segments))
    tokens = sum(segment.count for segment in segments)
    queries = torch.randn(tokens, HEADS, DIM, generator=generator)
    keys, values = torch.randn(2, kv_heads, BLOCKS * BLOCK_TOKENS, DIM, generator=generator).to(cached)
    attentions = (RunAttention(segments, torch.float32), GatherAttention(segments, CPU))
    for way in ways or (PLAIN,):
        expected = torch.cat(
            [
                exact(
                    queries[segment.start : segment.start + segment.count],
                    keys[:, positions_of(segment)],
                    values[:, positions_of(segment)],
                    way,
                )
                for segment in segments
            ]
        )
        for attention in attentions:
            found = attention(queries, keys, values, way).double()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


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


SINKS = torch.linspace(-2, 3, HEADS)
WAYS = {
    "scale": (Scores(scale=0.7),),
    "softcap": (Scores(softcap=1.5),),
    "sinks": (Scores(sinks=SINKS),),
    "all at once": (Scores(window=19, scale=0.4, softcap=2.0, sinks=SINKS),),
    "windows": tuple(Scores(window=window) for window in (1, 3, 16, 17, 40, 1000, None)),
}


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("step", [1, 2])
def test_layers_may_look_in_their_own_ways(step: int, ways: tuple[Scores, ...]) -> None:
    """One attention serves layers of several kinds, over long and short, new and cached, in one run and in many."""
    pool = scattered_pool(step)
    segments, start = [], 0
    for before, tokens in ((37, 1), (0, 9), (16, 1), (48, 140), (70, 5), (0, 1)):
        segments.append(Segment(cache_of(pool, before, tokens), start, tokens))
        start += tokens
    check(segments, 2, *ways)
    for segment in segments:
        check([Segment(segment.cache, 0, segment.count)], 3, *ways)


def test_a_window_reads_no_more_than_it_sees() -> None:
    pool = BlockPool(BLOCKS)
    segments = [Segment(cache_of(pool, 300, 1), 0, 1), Segment(cache_of(pool, 200, 300), 1, 300)]
    plan = RunAttention(segments, torch.float32)._planned(20)
    assert max(piece.end - piece.begin for piece in plan.whole) <= 128 + 19
    assert [piece.end - piece.begin for piece in plan.whole if piece.rows == slice(0, 1)] == [20]
    seen = [positions.numel() for _, positions, _ in GatherAttention(segments, CPU)._planned(20)]
    assert seen == [20, 319]


def test_sequences_that_share_a_prefix_share_the_window_s_part_of_it() -> None:
    pool = BlockPool(BLOCKS)
    prompt = list(range(3 * BLOCK_TOKENS))
    first = SequenceCache(pool)
    first.reserve(len(prompt) + 1)
    first.advance(prompt, len(prompt))
    others = [SequenceCache(pool, prompt) for _ in range(3)]
    for cache in others:
        cache.reserve(9)
        cache.length += 7
    segments = [Segment(cache, row, 1) for row, cache in enumerate((first, *others))]
    check(segments, 2, *WAYS["windows"], *WAYS["all at once"])


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
    shared = [
        piece for piece in attention._planned(None).parts if isinstance(piece.rows, Tensor) and len(piece.rows) > 1
    ]
    assert [(len(piece.rows), piece.end - piece.begin) for piece in shared] == [(3, len(prompt))]
    check(segments, 2)


@pytest.mark.parametrize("cached", [torch.float16, torch.bfloat16])
def test_a_cache_may_be_narrower_than_the_activations(cached: torch.dtype) -> None:
    pool = scattered_pool(2)
    segments = [Segment(cache_of(pool, 37, 1), 0, 1), Segment(cache_of(pool, 40, 130), 1, 130)]
    check(segments, 2, PLAIN, *WAYS["all at once"], cached=cached)


@pytest.mark.cpu_forms
def test_sixteen_bits_stay_close() -> None:
    pool = scattered_pool(2)
    segment = Segment(cache_of(pool, 40, 9), 0, 9)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(9, HEADS, DIM, generator=generator).bfloat16()
    keys, values = torch.randn(2, 2, BLOCKS * BLOCK_TOKENS, DIM, generator=generator).bfloat16()
    runs = RunAttention([segment], torch.bfloat16)(queries, keys, values)
    assert runs.dtype == torch.bfloat16
    torch.testing.assert_close(runs, GatherAttention([segment], CPU)(queries, keys, values), atol=2e-2, rtol=2e-2)
