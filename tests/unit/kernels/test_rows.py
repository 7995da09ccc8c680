"""Rows of a stored matrix as numbers."""

from collections.abc import Callable

import torch

from rbee_worker.kernels.arguments import StoredMatrix, StoredWeights
from rbee_worker.kernels.formats import Format
from rbee_worker.kernels.library import Kernels
from tests.unit.kernels.matrices import columns_of, make_matrix, set_scales


def rows(kernels: Kernels, matrix: StoredMatrix, *wanted: int) -> torch.Tensor:
    return kernels.rows(StoredWeights([matrix]), torch.tensor(wanted, dtype=torch.int64))


def test_rows_are_what_decode_says(kernels: Kernels, form: Format) -> None:
    for near in (1, 7, 8, 15, 16, 17, 33, 64, 224, 288, 576, 1055, 2304):
        for shift in (0, 1):
            matrix = make_matrix(form, 12, columns_of(form, near), near, shift=shift)
            numbers = form.decode(matrix.data)
            for wanted in ([0], [11], [5, 0, 11, 11, 5, 5], [*range(12)]):
                assert torch.equal(rows(kernels, matrix, *wanted), numbers[wanted]), (near, wanted)


def test_rows_of_extreme_scales(kernels: Kernels, form: Format) -> None:
    if not form.in_blocks:
        return
    for scale in (2.0**-24, 1023 * 2.0**-24, 65504.0, -65504.0, 0.0):
        matrix = make_matrix(form, 9, columns_of(form, 288))
        set_scales(form, matrix.data, scale)
        assert torch.equal(rows(kernels, matrix, *range(9)), form.decode(matrix.data))


def test_no_rows_and_many_rows(with_threads: Callable[[int], Kernels], form: Format) -> None:
    matrix = make_matrix(form, 40, columns_of(form, 96))
    wanted = torch.randint(40, (700,), generator=torch.Generator().manual_seed(0))
    for threads in (1, 2, 5):
        assert rows(with_threads(threads), matrix).shape == (0, matrix.columns)
        found = with_threads(threads).rows(StoredWeights([matrix]), wanted)
        assert torch.equal(found, form.decode(matrix.data)[wanted])
