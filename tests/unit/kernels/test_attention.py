"""Attention over the paged pool: against float64, and the same bits however the work is cut."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rbee_worker.kernels.arguments import Segments
from rbee_worker.kernels.library import Kernels, attends
from tests.unit.kernels import twins

Runs = list[tuple[int, int]]
WithThreads = Callable[[int], Kernels]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNK = 128
"""Positions whose results are merged: ``kChunk`` of ``cpp/attention.h``."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Cached:
    """A sequence's queries, keys and values, and pools that hold them in any order."""

    def __init__(self, length: int, shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> None:
        """``shape``: heads, kv_heads, head_dim."""
        self.length, (heads, kv_heads, head_dim) = length, shape
        # A slice of what the matrix for q, k and v gives, as in the model.
        self.queries = random(length, heads + 2 * kv_heads, head_dim, seed=seed)[:, :heads]
        self.keys = random(kv_heads, length, head_dim, dtype=dtype, seed=seed + 1)
        self.values = random(kv_heads, length, head_dim, dtype=dtype, seed=seed + 2)

    def pool(self, runs: Runs) -> tuple[Tensor, Tensor]:
        """Keys and values that lie in runs; what nobody wrote is not a number."""
        size = max(end for _, end in runs)
        places = torch.cat([torch.arange(*run) for run in runs])[: self.length]
        pools = []
        for own in (self.keys, self.values):
            pool = own.new_full((own.shape[0], size, own.shape[2]), math.nan)
            pool[:, places] = own
            pools.append(pool)
        return pools[0], pools[1]


def cut(sizes: Sequence[int], gap: int = 3) -> Runs:
    """Runs of these sizes, the first ones at the end of the pool."""
    runs, begin = [], gap
    for size in reversed(sizes):
        runs.append((begin, begin + size))
        begin += size + gap
    return runs[::-1]


CASES = [
    # tokens, positions before, heads, kv_heads, head_dim, window, softcap, sinks
    (1, 0, 1, 1, 8, None, None, False),
    (1, 1, 2, 2, 16, None, None, True),
    (1, 126, 9, 3, 64, None, None, False),
    (1, 127, 9, 3, 64, None, None, False),
    (1, 128, 32, 4, 64, None, None, False),
    (1, 900, 7, 1, 80, 200, None, False),
    (1, 900, 8, 8, 40, 1, None, True),
    (3, 500, 71, 1, 64, None, None, False),
    (2, 700, 8, 4, 256, 300, 30.0, True),
    (64, 0, 9, 3, 64, None, None, False),
    (150, 37, 6, 2, 24, None, 5.0, False),
    (200, 300, 8, 1, 72, 50, None, True),
    (130, 250, 4, 2, 128, 129, None, False),
    (5, 128, 3, 3, 520, 7, None, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_softmax_over_what_a_token_sees(with_threads: WithThreads, dtype: torch.dtype) -> None:
    for case in CASES:
        tokens, before, heads, kv_heads, head_dim, window, softcap, has_sinks = case
        sequence = Cached(before + tokens, (heads, kv_heads, head_dim), dtype)
        sinks = random(heads, seed=9) if has_sinks else None
        scale = 3 * head_dim**-0.5
        special = {"window": window, "softcap": softcap, "sinks": sinks, "scale": scale}
        want = twins.attention(sequence.queries[before:], sequence.keys, sequence.values, **special)
        runs = cut([before + tokens])
        found = with_threads(2).attention(
            sequence.queries[before:], *sequence.pool(runs), Segments([(0, tokens, before, runs)]), **special
        )
        assert found.dtype == torch.float32
        assert found.shape == (tokens, heads * head_dim)
        # Values are of the size 1, and the sum of their weights is 1.
        assert (found - want).abs().max() < 1e-5, case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"), [(None, None, False), (75, None, True), (None, 4.0, False)]
)
def test_a_token_has_the_same_bits_however_the_work_is_cut(
    with_threads: WithThreads, dtype: torch.dtype, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    heads, length = 6, 2 * CHUNK + 61
    sequence = Cached(length, (heads, 2, 24), dtype)
    special = {"window": window, "softcap": softcap, "sinks": random(heads) if has_sinks else None, "scale": 0.3}
    # 11: each of a few tokens' chunks is a task of its own.
    one, many = (with_threads(threads) for threads in (1, 11))

    runs = cut([length])
    want = one.attention(sequence.queries, *sequence.pool(runs), Segments([(0, length, 0, runs)]), **special)

    # In steps of several sizes, with the sequence in pieces, and with other sequences beside it.
    blocks = [16] * (length // 16 + 1)
    odd = [1, 30, 2, 65, 7, 100, length]
    for steps, sizes, own in itertools.product(([length], [200, *[1] * 20, 97]), ([length], blocks, odd), (one, many)):
        runs = cut(sizes)
        keys, values = sequence.pool(runs)
        neighbour = Cached(length, (heads, 2, 24), dtype, seed=5)
        position = 0
        for count in steps:
            mine = sequence.queries[position : position + count]
            queries = torch.cat((neighbour.queries[:3], mine, neighbour.queries[3:4]))
            segments = Segments([(0, 3, 8, [(0, 20)]), (3, count, position, runs), (3 + count, 1, 150, [(9, 160)])])
            finite = (keys.nan_to_num(), values.nan_to_num())  # the neighbours' positions hold anything
            found = own.attention(queries, *finite, segments, **special)
            assert torch.equal(found[3:-1], want[position : position + count]), (steps, sizes)
            found = own.attention(mine, keys, values, Segments([(0, count, position, runs)]), **special)
            assert torch.equal(found, want[position : position + count]), (steps, sizes)
            position += count
        assert position == length


def test_segments_of_a_batch_keep_apart(with_threads: WithThreads) -> None:
    sequences = [Cached(length, (4, 2, 32), torch.float32, seed=length) for length in (40, 300, 5)]
    counts, row, begin = (1, 150, 5), 0, 0
    described, queries, pools, wants = [], [], [], []
    for sequence, count in zip(sequences, counts, strict=True):
        before = sequence.length - count
        described.append((row, count, before, [(begin, begin + sequence.length)]))
        queries.append(sequence.queries[before:])
        pools.append((sequence.keys, sequence.values))
        wants.append(twins.attention(queries[-1], *pools[-1], scale=0.2))
        row, begin = row + count, begin + sequence.length
    keys, values = (torch.cat(side, dim=1) for side in zip(*pools, strict=True))
    found = with_threads(2).attention(torch.cat(queries), keys, values, Segments(described), scale=0.2)
    assert (found - torch.cat(wants)).abs().max() < 1e-5


def test_results_of_many_chunks_are_merged_in_waves(with_threads: WithThreads) -> None:
    # 64 heads of 256 take 66 kB of each chunk: more of them than are kept at once.
    length, runs = 70 * CHUNK, [(0, 70 * CHUNK)]
    queries = random(1, 64, 256)
    keys, values = (random(1, length, 256, dtype=torch.float16, seed=seed) for seed in (1, 2))
    arguments = (queries, keys, values, Segments([(0, 1, length - 1, runs)]))
    found = with_threads(2).attention(*arguments, scale=0.1)
    assert torch.equal(found, with_threads(1).attention(*arguments, scale=0.1))
    want = twins.attention(queries[:, :2], keys, values, scale=0.1)
    assert (found[:, : 2 * 256] - want).abs().max() < 1e-5


def test_what_is_not_finite_reaches_those_who_see_it(with_threads: WithThreads) -> None:
    length, heads = CHUNK + 40, 2
    run = [(0, length)]

    def attended(sequence: Cached, **special: float) -> Tensor:
        segments = Segments([(0, length, 0, run)])
        arguments = (sequence.queries, sequence.keys, sequence.values)
        found = with_threads(2).attention(*arguments, segments, scale=1.0, **special)
        want = twins.attention(*arguments, scale=1.0, **special)
        assert torch.equal(found.isnan(), want.isnan())
        return found.view(length, heads, 16)

    def clean() -> Cached:
        return Cached(length, (heads, 1, 16), torch.float32)

    for special in ({}, {"softcap": 20.0}):
        poisoned = clean()
        poisoned.keys[0, 50, 3] = math.nan
        found = attended(poisoned, **special)
        assert found[50:].isnan().all()
        assert found[:50].isfinite().all()
        poisoned = clean()
        poisoned.queries[20, 1, 0] = math.nan
        assert attended(poisoned, **special).isnan().any(-1).nonzero().tolist() == [[20, 1]]

    # Values: those who do not see it yet have their own bits, though it stands in the same chunk.
    want, bad = attended(clean()), clean()
    bad.values[0, 100, 5] = math.inf
    segments = Segments([(0, length, 0, run)])
    found = with_threads(2).attention(bad.queries, bad.keys, bad.values, segments, scale=1.0).view(length, heads, 16)
    assert torch.equal(found[:100], want[:100])
    assert (found[100:, :, 5] == math.inf).all()
    assert torch.equal(found[100:, :, 6:], want[100:, :, 6:])


def test_scores_that_are_infinite(with_threads: WithThreads) -> None:
    length = CHUNK + 5
    keys = torch.ones(1, length, 8)
    keys[0, : CHUNK + 1] = -math.inf  # a whole chunk weighs nothing
    values, segments = random(1, length, 8), Segments([(0, length, 0, [(0, length)])])
    found = with_threads(2).attention(torch.ones(length, 1, 8), keys, values, segments, scale=1.0)
    assert found[: CHUNK + 1].isnan().all()  # as softmax has it
    assert (found[CHUNK + 1 :] - values[0, CHUNK + 1 :].cumsum(0) / torch.arange(1, 5)[:, None]).abs().max() < 1e-6
    sinks = torch.zeros(1)
    found = with_threads(2).attention(torch.ones(length, 1, 8), keys, values, segments, scale=1.0, sinks=sinks)
    assert (found[: CHUNK + 1] == 0).all()


def test_scores_far_apart_do_not_overflow(with_threads: WithThreads) -> None:
    sequence = Cached(300, (3, 1, 64), torch.float32)
    arguments = (sequence.queries * 40, sequence.keys, sequence.values)
    found = with_threads(2).attention(*arguments, Segments([(0, 300, 0, [(0, 300)])]), scale=1.0)
    assert (found - twins.attention(*arguments, scale=1.0)).abs().max() < 2e-3  # scores are of the size 1,000


def test_what_attention_does_not_take_is_refused(with_threads: WithThreads) -> None:
    own = with_threads(2)
    queries, keys, segments = random(1, 2, 8), random(1, 16, 8), Segments([(0, 1, 0, [(0, 16)])])
    assert own.attention(queries, keys, keys, segments, scale=1.0).shape == (1, 16)
    bad = [
        (random(1, 2, 12), random(1, 16, 12), random(1, 16, 12)),  # no multiple of 8
        (queries.double(), keys, keys),
        (queries, keys.double(), keys.double()),
        (queries, keys, keys.half()),
        (queries, keys, random(1, 17, 8)),
        (queries, random(1, 8, 16).transpose(1, 2), random(1, 8, 16).transpose(1, 2)),
        (random(1, 3, 8), random(2, 16, 8), random(2, 16, 8)),  # heads that share no keys
        (random(2, 2, 8), keys, keys),  # a token of nobody
        (random(1, 8, 2).transpose(1, 2), keys, keys),
    ]
    for arguments in bad:
        with pytest.raises(ValueError):
            own.attention(*arguments, segments, scale=1.0)


def test_attends_names_the_shapes() -> None:
    assert attends(64, torch.bfloat16)
    assert not attends(60, torch.bfloat16)
    assert not attends(64, torch.float64)


def test_runs_must_hold_a_sequence() -> None:
    Segments([(0, 4, 12, [(0, 8), (20, 28)])])
    with pytest.raises(ValueError, match="runs of 15 positions do not hold 16"):
        Segments([(0, 4, 12, [(0, 7), (20, 28)])])
    with pytest.raises(ValueError, match="do not hold"):
        Segments([(0, 0, 0, [])])
