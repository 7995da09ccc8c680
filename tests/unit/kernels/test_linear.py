"""The linear kernels: right to the last bit that float32 allows, and the same bits whatever is beside a token."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rbee_worker.kernels.arguments import StoredMatrix, StoredWeights
from rbee_worker.kernels.formats import FORMATS, Format
from rbee_worker.kernels.library import Kernels
from tests.unit.kernels.matrices import (
    BLOCK_FORMATS,
    FLOAT_FORMATS,
    QUANTS,
    blocks_of,
    columns_of,
    decoded,
    expected,
    linear,
    lowest,
    make_exact,
    make_matrix,
    normal,
    set_scales,
)

TOKENS = [*range(1, 66), 130, 513]
OUTPUTS = [1, 2, 3, 5, 23, 24, 25, 49]
"""Around what a tile and a chunk of work have."""
FLOAT_COLUMNS = [1, 7, 8, 15, 16, 17, 33, 1023, 1024, 1025, 1040, 2048 + 3]
BLOCK_COLUMNS = [*range(32, 545, 32), 576, 1024 + 32]
K_COLUMNS = [256, 512, 768, 2304]

block_format = pytest.mark.parametrize("form", BLOCK_FORMATS, ids=lambda form: form.name)
float_format = pytest.mark.parametrize("form", FLOAT_FORMATS, ids=lambda form: form.name)


def columns_for(form: Format) -> list[int]:
    return {1: FLOAT_COLUMNS, 32: BLOCK_COLUMNS, 256: K_COLUMNS}[form.block]


def awkward(form: Format) -> int:
    """A width with a rest in every step, and of more than one piece of the kernels' work."""
    return {1: 2048 + 3, 32: 1024 + 32, 256: 2304}[form.block]


# ------------------------------------------------------------------------------------------------------------- shapes


def test_whole_numbers_are_multiplied_without_any_error(kernels: Kernels, form: Format) -> None:
    for columns in columns_for(form):
        matrix, x = make_exact(form, 25, columns, 18, seed=columns)
        exact = x.double() @ decoded(matrix).T
        if form.in_blocks:  # so that each intermediate value is a whole number that float32 has
            offset = lowest(matrix)
            assert (x.abs().double() @ ((decoded(matrix) - offset).abs() + offset.abs()).T).max() < 2**24
        assert torch.equal(linear(kernels, [matrix], x).double(), exact), columns
        assert torch.equal(linear(kernels, [matrix], x[:3]).double(), exact[:3]), columns


def test_every_number_of_columns(kernels: Kernels, form: Format) -> None:
    for columns in columns_for(form):
        matrix, x, bias = make_matrix(form, 25, columns, columns), normal(18, columns, seed=1), normal(25, seed=2)
        twin = expected(kernels, [matrix], x, bias)
        twin.check(linear(kernels, [matrix], x, bias))
        twin.of(4, 25).check(linear(kernels, [matrix], x[:4], bias))


def test_every_number_of_tokens(kernels: Kernels, form: Format) -> None:
    """Right for the most tokens, and for fewer of them the same bits."""
    matrix, x = make_matrix(form, 25, awkward(form)), normal(TOKENS[-1], awkward(form), seed=1)
    weights = StoredWeights([matrix])
    most = kernels.linear(x, weights)
    expected(kernels, [matrix], x).check(most)
    for tokens in TOKENS:
        assert torch.equal(kernels.linear(x[:tokens], weights), most[:tokens]), tokens
    assert kernels.linear(x[:0], weights).shape == (0, 25)


def test_every_number_of_outputs(kernels: Kernels, form: Format) -> None:
    columns = columns_of(form, 288)
    matrix, x, bias = make_matrix(form, OUTPUTS[-1], columns), normal(18, columns, seed=1), normal(OUTPUTS[-1], seed=2)
    twin = expected(kernels, [matrix], x, bias)
    for outputs in OUTPUTS:
        part = StoredMatrix(matrix.data[:outputs], form, outputs, columns)
        for tokens in (1, 5, 18):
            twin.of(tokens, outputs).check(linear(kernels, [part], x[:tokens], bias[:outputs]))


@float_format
def test_whole_float_rows_are_right_in_every_tile(kernels: Kernels, form: Format) -> None:
    """Rows of whole registers are read as they are stored for up to sixteen tokens, and made float32 first for more."""
    matrix, x = make_matrix(form, 13, 2048), normal(9, 2048, seed=1)
    many = linear(kernels, [matrix], x)
    expected(kernels, [matrix], x).check(many)
    for tokens in range(1, 9):
        assert torch.equal(linear(kernels, [matrix], x[:tokens]), many[:tokens]), tokens


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 5, 70])
def test_several_matrices_lie_side_by_side(kernels: Kernels, tokens: int, biased: bool) -> None:
    names = ["Q4_K", "F16", "Q8_0", "F32", "Q6_K", "BF16", "Q4_0", "Q5_K", "Q4_1"]
    matrices = [
        make_matrix(FORMATS[name], outputs, 768, i)
        for i, (name, outputs) in enumerate(zip(names, [25, 3, 49, 1, 24, 7, 2, 50, 5], strict=True))
    ]
    outputs = sum(matrix.rows for matrix in matrices)
    x, bias = normal(tokens, 768, seed=1), normal(outputs, seed=2) if biased else None
    y = linear(kernels, matrices, x, bias)
    expected(kernels, matrices, x, bias).check(y)
    first = 0
    for matrix in matrices:
        mine = slice(first, first + matrix.rows)
        alone = linear(kernels, [matrix], x, bias[mine] if bias is not None else None)
        assert torch.equal(y[:, mine], alone), matrix.format.name
        first += matrix.rows


def test_activations_need_not_be_contiguous(kernels: Kernels, form: Format) -> None:
    columns = columns_of(form, 96)
    matrix, x = make_matrix(form, 9, columns), normal(6, columns, seed=1)
    y = linear(kernels, [matrix], x)
    wide = torch.full((6, 2 * columns + 3), torch.nan)
    wide[:, 3::2] = x
    for strided in (wide[:, 3::2], x.T.contiguous().T, torch.cat([x, x])[6:], x.flip(0)[[5, 4, 3, 2, 1, 0]]):
        assert torch.equal(linear(kernels, [matrix], strided), y)
    assert torch.equal(linear(kernels, [matrix], x[2:3].expand(4, -1)), y[2:3].expand(4, -1))


# ---------------------------------------------------------------------------------------------------------- same bits


def test_a_token_has_the_same_bits_at_any_place_of_any_batch(kernels: Kernels, form: Format) -> None:
    columns = awkward(form)
    weights, token = StoredWeights([make_matrix(form, 31, columns)]), normal(1, columns, seed=1)
    alone = kernels.linear(token, weights)
    for tokens in (2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 67):
        batch = normal(tokens, columns, seed=tokens) * 100
        for place in {0, tokens // 2, tokens - 1}:
            beside = batch.clone()
            beside[place] = token
            assert torch.equal(kernels.linear(beside, weights)[place : place + 1], alone), (tokens, place)


def test_a_token_has_the_same_bits_for_any_number_of_threads(
    with_threads: Callable[[int], Kernels], form: Format
) -> None:
    columns = awkward(form)
    matrices = [make_matrix(form, outputs, columns, outputs) for outputs in (97, 10)]
    x, bias = normal(19, columns, seed=1), normal(107, seed=2)
    one = linear(with_threads(1), matrices, x, bias)
    for threads in (2, 3, 5):
        for tokens in (1, 4, 19):
            assert torch.equal(linear(with_threads(threads), matrices, x[:tokens], bias), one[:tokens]), threads


# ----------------------------------------------------------------------------------------------------------- extremes


def test_weights_may_lie_at_any_address(kernels: Kernels, form: Format) -> None:
    columns = columns_of(form, 288)
    plain, x = make_matrix(form, 26, columns), normal(6, columns, seed=1)
    y = linear(kernels, [plain], x)
    for shift in (1, 3, 7, 31):
        matrix = make_matrix(form, 26, columns, shift=shift)
        assert matrix.data.data_ptr() % (form.dtype.itemsize * 2) == form.dtype.itemsize
        assert torch.equal(linear(kernels, [matrix], x), y)
        assert torch.equal(linear(kernels, [matrix], x[:1]), y[:1])


def test_activations_may_lie_at_any_address(kernels: Kernels, form: Format) -> None:
    columns = columns_of(form, 288)
    matrix, x, bias = make_matrix(form, 9, columns), normal(6, columns, seed=1), normal(9, seed=2)
    y = linear(kernels, [matrix], x, bias)
    shifted, shifted_bias = torch.empty(6 * columns + 1)[1:].view(6, columns), torch.empty(10)[1:]
    shifted.copy_(x), shifted_bias.copy_(bias)
    assert torch.equal(linear(kernels, [matrix], shifted, shifted_bias), y)


SMALLEST_HALF, LARGEST_HALF = 2.0**-24, 65504.0


@block_format
def test_scales_and_activations_of_any_size(kernels: Kernels, form: Format) -> None:
    """Also where the scale of activations is below the smallest normal number, so that there is no inverse of it."""
    columns = columns_of(form, 288)
    matrix, x = make_matrix(form, 7, columns), normal(5, columns, seed=1)
    for scale in (SMALLEST_HALF, -SMALLEST_HALF, 1023 * SMALLEST_HALF, LARGEST_HALF, -LARGEST_HALF, 0.0):
        set_scales(form, matrix.data, scale)
        for size in (1e-44, 1e-40, 1e-37, 1e-36, 1e-30, 1.0, 1e20):
            twin = expected(kernels, [matrix], x * size)
            assert twin.values.isfinite().all()
            assert ((twin.values - (x * size).double() @ decoded(matrix).T).abs() <= rounding(matrix, x * size)).all()
            twin.check(linear(kernels, [matrix], x * size))


def rounding(matrix: StoredMatrix, x: Tensor) -> Tensor:
    """By how much a result may change where each activation is rounded to a step of its block, or lost as too small.

    A rounded one is off by half a step, and a little more since the inverse of the scale was rounded.
    """
    step = x.view(x.shape[0], -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(x.shape).double() / 127
    return (step * 0.5001 + 127.01 * 2.0**-126) @ decoded(matrix).abs().T


@float_format
def test_denormal_and_large_floats(kernels: Kernels, form: Format) -> None:
    info = torch.finfo(form.dtype)
    for weight in (info.smallest_normal / 4, min(info.max, 1e15)):
        matrix = make_matrix(form, 7, 37)
        matrix.data.copy_(normal(7, 37, seed=2).clamp(-1, 1) * weight)
        assert matrix.data.any()
        for size in (1e-44, 1e-37, 1.0, 1e20):
            x = normal(5, 37, seed=1) * size
            y = linear(kernels, [matrix], x)
            expected(kernels, [matrix], x).check(y)
            assert size < 1 or y.any(), "denormal numbers are not zeros"


@block_format
def test_extreme_weights_by_extreme_activations(kernels: Kernels, form: Format) -> None:
    """All bits of weights, scales and minima set, or none: no sum in 16 bits overflows."""
    columns = columns_of(form, 512)
    matrix = make_matrix(form, 7, columns)
    signs = torch.ones(columns)
    signs[1::2] = -1
    x = torch.stack([torch.ones(columns), -torch.ones(columns), signs, torch.zeros(columns), normal(columns, seed=1)])
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        matrix.data[:] = byte
        set_scales(form, matrix.data, -0.5)
        twin = expected(kernels, [matrix], x)
        for tokens in range(1, 6):
            twin.of(tokens, 7).check(linear(kernels, [matrix], x[:tokens]))


@block_format
def test_each_bit_of_a_block_is_its_own(kernels: Kernels, form: Format) -> None:
    """Every bit that is a weight's, alone: each changes the results of the columns that ``Format.decode`` says."""
    places = range(form.block_bytes)[QUANTS[form.name]]
    matrix = make_matrix(form, len(places) * 8, form.block)
    blocks = blocks_of(form, matrix.data)[:, 0]
    blocks[:] = blocks[0].clone()
    blocks[:, QUANTS[form.name]] = 0
    set_scales(form, matrix.data, 1.0)
    rows = torch.arange(matrix.rows)
    blocks[rows, places[0] + rows // 8] = (1 << rows % 8).byte()
    x = torch.eye(form.block) * 127
    twin = expected(kernels, [matrix], x)
    twin.check(linear(kernels, [matrix], x))
    assert len(twin.values.unique(dim=1).T) == matrix.rows


def test_what_is_not_finite_stays_in_its_token(kernels: Kernels, form: Format) -> None:
    columns = columns_of(form, 288)
    matrix, x, bias = make_matrix(form, 26, columns), normal(9, columns, seed=1), normal(26, seed=2)
    right = linear(kernels, [matrix], x, bias)
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in (0, columns // 2, columns - 1):
            for tokens in (1, 3, 4, 9):
                broken = x[:tokens].clone()
                broken[-1, place] = value
                y = linear(kernels, [matrix], broken, bias)
                assert torch.equal(y[:-1], right[: tokens - 1])
                assert not y[-1].isfinite().any()
    assert torch.equal(linear(kernels, [matrix], x, bias), right), "nothing of it is left"


def test_zeros_yield_the_bias(kernels: Kernels, form: Format) -> None:
    columns = columns_of(form, 288)
    matrix, bias = make_matrix(form, 26, columns), normal(26, seed=2)
    y = linear(kernels, [matrix], torch.zeros(6, columns), bias)
    assert torch.equal(y, bias.expand(6, -1))


def test_a_matrix_of_no_rows_adds_no_outputs(kernels: Kernels, form: Format) -> None:
    columns = columns_of(form, 96)
    some, none = make_matrix(form, 5, columns), make_matrix(form, 0, columns)
    x: Tensor = normal(3, columns, seed=1)
    assert torch.equal(linear(kernels, [none, some, none], x), linear(kernels, [some], x))
    assert linear(kernels, [none], x).shape == (3, 0)
