"""Norms, rotation with the write to the cache, and activations: against float64, and the same bits in any batch."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.kernels.arguments import RotaryTables
from rbee_worker.kernels.library import Kernels
from tests.unit.kernels import twins

WithThreads = Callable[[int], Kernels]
Activation = Literal["silu", "gelu", "gelu-tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu-tanh")
WIDTHS = (1, 7, 8, 15, 16, 17, 63, 64, 65, 100, 576, 2051)
NAN, INF = math.nan, math.inf


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, want: Tensor, relative: float = 1e-6, absolute: float = 1e-7) -> bool:
    return torch.allclose(found.double(), want, rtol=relative, atol=absolute)


# ---------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(with_threads: WithThreads, width: int) -> None:
    own = with_threads(2)
    x, weight = random(5, width), random(width, seed=1)
    for scale in (1e-12, 1.0, 1e12):
        found = own.rms_norm(x * scale, weight, 1e-6)
        assert close(found, twins.rms_norm(x * scale, weight, 1e-6), absolute=0)
    assert torch.equal(own.rms_norm(x[2:3], weight, 1e-6), own.rms_norm(x, weight, 1e-6)[2:3])


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_of_a_sum_writes_the_sum_back(with_threads: WithThreads, width: int) -> None:
    x, residual, weight = random(3, width), random(3, width + 2, seed=1)[:, 2:], random(width, seed=2)
    for multiplier in (1.0, 0.22):
        total, before = residual + multiplier * x, residual.clone()
        found = with_threads(2).rms_norm(x, weight, 1e-5, residual=residual, multiplier=multiplier)
        assert torch.equal(residual, total) if multiplier == 1.0 else close(residual, total.double())
        assert close(found, twins.rms_norm(residual, weight, 1e-5))
        residual.copy_(before)


def test_rms_norm_of_heads_and_of_slices(with_threads: WithThreads) -> None:
    own, wide = with_threads(2), random(40, 13, 24)
    heads, weight = wide[:, 2:9], random(7, 24, seed=1)
    want = twins.rms_norm(heads, weight, 1e-6)
    found = own.rms_norm(heads, weight, 1e-6)
    assert found.is_contiguous()
    assert close(found, want)
    kept = wide.clone()
    assert own.rms_norm(heads, weight, 1e-6, out=heads) is heads
    assert torch.equal(heads, found)
    assert torch.equal(wide[:, :2], kept[:, :2])
    assert torch.equal(wide[:, 9:], kept[:, 9:])


def test_rms_norm_of_what_is_not_finite_is_as_torch_has_it(with_threads: WithThreads) -> None:
    x, weight = random(6, 40), random(40, seed=1)
    x[1, 3], x[2, 39], x[3, 5], x[4] = NAN, INF, -INF, 0
    found, want = with_threads(2).rms_norm(x, weight, 1e-6), functional.rms_norm(x, (40,), weight, 1e-6)
    assert torch.equal(found.isnan(), want.isnan())
    assert close(found.nan_to_num(), want.nan_to_num().double())
    assert found[1].isnan().all()
    assert found[[0, 4, 5]].isfinite().all()


def test_norms_that_do_not_fit_are_refused(with_threads: WithThreads) -> None:
    own, x = with_threads(2), random(2, 8)
    for bad, weight in ((x.double(), random(8)), (x, random(8).half()), (x, random(7)), (random(8, 2).T, random(8))):
        with pytest.raises(ValueError):
            own.rms_norm(bad, weight, 1e-6)
    with pytest.raises(ValueError):
        own.rms_norm(x, random(8), 1e-6, residual=random(3, 8))


# ------------------------------------------------------------------------------------------------------------- rotation

SHAPES = [
    # heads, kv_heads, head_dim, rotary_dim
    (9, 3, 64, 64),
    (2, 1, 8, 8),
    (4, 4, 80, 32),
    (3, 1, 24, 20),
    (1, 1, 10, 6),
    (5, 1, 256, 256),
    (3, 2, 16, 0),
]


def tables_for(rotary_dim: int, tokens: int, *, interleaved: bool) -> RotaryTables | None:
    if rotary_dim == 0:
        return None
    # More rows than tokens, in no order; not of one angle each, so that each entry must be where it belongs.
    cos, sin = random(50, rotary_dim, seed=7), random(50, rotary_dim, seed=8)
    return RotaryTables(cos, sin, torch.arange(50).flip(0)[:tokens].contiguous(), interleaved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_the_write_to_the_cache(
    with_threads: WithThreads, dtype: torch.dtype, interleaved: bool, normed: bool
) -> None:
    own, tokens = with_threads(2), 37
    for heads, kv_heads, head_dim, rotary_dim in SHAPES:
        both = heads + kv_heads
        wide = random(tokens, both + kv_heads + 1, head_dim)
        qkv, before = wide[:, 1:], wide.clone()
        norm = random(both, head_dim, seed=1) if normed else None
        tables = tables_for(rotary_dim, tokens, interleaved=interleaved)
        cache = torch.full((2, kv_heads, 60, head_dim), NAN, dtype=dtype)
        slots = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:tokens]

        want = before[:, 1 : 1 + both]
        want = want.double() if norm is None else twins.rms_norm(want, norm, 1e-5)
        if tables is not None:
            cos, sin = tables.cos[tables.rows], tables.sin[tables.rows]
            want = twins.rotate(want, cos, sin, interleaved=interleaved)
        queries = own.rotate_and_store(qkv, cache[0], cache[1], slots, tables=tables, norm=norm, eps=1e-5)
        assert queries.data_ptr() == qkv.data_ptr()
        assert queries.shape == (tokens, heads, head_dim)
        assert close(qkv[:, :both], want, absolute=3e-6)
        assert torch.equal(qkv[:, both:], before[:, 1 + both :])
        assert torch.equal(wide[:, :1], before[:, :1])
        # Rounded half to even, as torch rounds.
        assert torch.equal(cache[0][:, slots], qkv[:, heads:both].transpose(0, 1).to(dtype))
        assert torch.equal(cache[1][:, slots], qkv[:, both:].transpose(0, 1).to(dtype))
        assert cache.isnan().sum() == (60 - tokens) * 2 * kv_heads * head_dim

        # One token at a time, by one thread: the same bits.
        again = torch.zeros_like(cache)
        for token in range(tokens):
            one = before[token : token + 1, 1:].clone()
            rows = None if tables is None else tables.rows[token : token + 1]
            own_row = None if rows is None else RotaryTables(tables.cos, tables.sin, rows, interleaved)
            slot = slots[token : token + 1]
            with_threads(1).rotate_and_store(one, again[0], again[1], slot, tables=own_row, norm=norm, eps=1e-5)
            assert torch.equal(one[0], qkv[token])
        assert torch.equal(again[:, :, slots], cache[:, :, slots])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cache_rounds_as_torch_does(with_threads: WithThreads, dtype: torch.dtype) -> None:
    # All patterns of the high 16 bits with low ones around a tie: denormals, the largest, infinities, not a number.
    high = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    values = torch.cat([(high | low).view(torch.float32) for low in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000)])
    values = torch.cat((values, (high | 0x8001).view(torch.float32))).view(-1, 1, 64)
    tokens = values.shape[0]
    qkv = torch.cat((torch.zeros_like(values), torch.zeros_like(values), values), dim=1)
    cache = torch.zeros(2, 1, tokens, 64, dtype=dtype)
    with_threads(2).rotate_and_store(qkv, cache[0], cache[1], torch.arange(tokens), tables=None)
    found, want = cache[1, 0], values[:, 0].to(dtype)
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found[~found.isnan()], want[~want.isnan()])
    assert torch.equal(found.signbit()[~found.isnan()], want.signbit()[~want.isnan()])


def test_rotations_that_do_not_fit_are_refused(with_threads: WithThreads) -> None:
    own, cache, slots = with_threads(2), torch.zeros(2, 1, 4, 8), torch.arange(2)
    good = RotaryTables(random(5, 8), random(5, 8), slots)
    own.rotate_and_store(random(2, 3, 8), cache[0], cache[1], slots, tables=good)
    wide = RotaryTables(random(5, 10), random(5, 10), slots)
    few = RotaryTables(random(5, 8), random(5, 8), slots[:1])
    for tables in (wide, few):
        with pytest.raises(ValueError):
            own.rotate_and_store(random(2, 3, 8), cache[0], cache[1], slots, tables=tables)
    for qkv, chosen in ((random(2, 3, 8).double(), slots), (random(2, 1, 8), slots), (random(2, 3, 8), slots.int())):
        with pytest.raises(ValueError):
            own.rotate_and_store(qkv, cache[0], cache[1], chosen, tables=good)
    with pytest.raises(ValueError):
        own.rotate_and_store(random(2, 3, 8), cache[0], cache[1], slots, tables=good, norm=random(3, 8))


def test_tables_of_another_form_are_refused() -> None:
    good, rows = random(5, 8), torch.arange(2)
    RotaryTables(good, good, rows)
    for cos, sin, of_tokens in (
        (random(5, 7), random(5, 7), rows),
        (good, random(5, 6), rows),
        (good, good.half(), rows),
        (random(8, 5).T, good, rows),
        (good, good, rows.int()),
        (good, good, rows[:, None]),
    ):
        with pytest.raises(ValueError):
            RotaryTables(cos, sin, of_tokens)


# ---------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(with_threads: WithThreads, activation: Activation) -> None:
    own = with_threads(2)
    for width in (*WIDTHS, 20_000):
        gate_up = random(3, 2 * width)
        found = own.gated(gate_up, activation)
        assert close(found, twins.gated(gate_up, activation), absolute=2e-7)
        assert torch.equal(own.gated(gate_up[1:2], activation), found[1:2])
        assert torch.equal(with_threads(1).gated(gate_up, activation), found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_exact_far_from_zero_too(with_threads: WithThreads, activation: Activation) -> None:
    gate = torch.linspace(-80, 80, 100_001)
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    found, want = with_threads(2).gated(gate_up, activation).double(), twins.gated(gate_up, activation)
    assert ((found - want).abs() <= 2e-7 * gate.abs() + 1e-38).all()
    # In float64 too, 1 + tanh(x) and 1 + erf(x) lose their digits further out.
    near = gate > (-80 if activation == "silu" else -4)
    assert ((found - want).abs() <= 2e-6 * want.abs())[:, near].all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_what_is_not_finite_are_as_torch_has_them(
    with_threads: WithThreads, activation: Activation
) -> None:
    gate = torch.tensor([NAN, INF, -INF, 3e38, -3e38, 1e20, -1e20, 0.0, -0.0, 1e-40, 2.0, 2.0, 2.0])
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 1.0, NAN, INF, -INF])
    gate_up = torch.cat((gate, up))[None]
    found, want = with_threads(2).gated(gate_up, activation), twins.gated(gate_up, activation).float()
    assert torch.equal(found.isnan(), want.isnan())
    assert close(found.nan_to_num(), want.nan_to_num().double())


def test_activations_that_do_not_fit_are_refused(with_threads: WithThreads) -> None:
    for bad in (random(2, 7), random(2, 8).half(), random(8, 2).T):
        with pytest.raises(ValueError):
            with_threads(2).gated(bad, "silu")
