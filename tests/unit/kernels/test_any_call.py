"""Calls of any shape that the rules allow: right, and a token's bits are its own."""

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rbee_worker.kernels.arguments import StoredMatrix, StoredWeights
from rbee_worker.kernels.formats import FORMATS
from rbee_worker.kernels.library import Kernels
from tests.unit.kernels.matrices import expected, linear, make_matrix, normal

FORMAT_NAMES = sorted(FORMATS)


@st.composite
def groups(draw: st.DrawFn) -> list[StoredMatrix]:
    """Matrices of one width and any formats that can have it, at any address."""
    names = draw(st.lists(st.sampled_from(FORMAT_NAMES), min_size=1, max_size=4))
    block = max(FORMATS[name].block for name in names)
    columns = block * draw(st.integers(1, {1: 1100, 32: 40, 256: 5}[block]))
    return [
        make_matrix(
            FORMATS[name], draw(st.integers(1, 52)), columns, draw(st.integers(0, 99)), shift=draw(st.integers(0, 9))
        )
        for name in names
    ]


def laid_out(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same numbers in other strides."""
    step, before = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    wide = torch.full((x.shape[0], before + x.shape[1] * step), torch.nan)
    strided = wide[:, before::step]
    strided.copy_(x)
    return strided if draw(st.booleans()) else strided.T.contiguous().T


@given(data=st.data(), matrices=groups())
def test_any_call_is_right(
    with_threads: Callable[[int], Kernels], data: st.DataObject, matrices: list[StoredMatrix]
) -> None:
    kernels = with_threads(data.draw(st.sampled_from([1, 2, 3, 5]), "threads"))
    tokens, columns, outputs = (
        data.draw(st.integers(1, 70), "tokens"),
        matrices[0].columns,
        sum(m.rows for m in matrices),
    )
    size = data.draw(st.sampled_from([1e-37, 1.0, 1e5]), "size")
    x = normal(tokens, columns, seed=data.draw(st.integers(0, 99), "seed")) * size
    bias = normal(outputs) if data.draw(st.booleans(), "biased") else None
    y = linear(kernels, matrices, laid_out(data.draw, x), bias)
    expected(kernels, matrices, x, bias).check(y)
    token = data.draw(st.integers(0, tokens - 1), "token")
    assert torch.equal(linear(with_threads(1), matrices, x[token : token + 1], bias), y[token : token + 1])


@given(data=st.data(), matrices=groups())
def test_any_rows_are_right(kernels: Kernels, data: st.DataObject, matrices: list[StoredMatrix]) -> None:
    matrix = matrices[0]
    wanted = data.draw(st.lists(st.integers(0, matrix.rows - 1), max_size=60))
    found = kernels.rows(StoredWeights([matrix]), torch.tensor(wanted, dtype=torch.int64))
    assert torch.equal(found, matrix.format.decode(matrix.data)[wanted])
