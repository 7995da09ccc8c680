"""What a format says of its bytes, against the ``gguf`` package, and what becomes of activations."""

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from rbee_worker.kernels.formats import FLOAT_FORMATS, FORMATS, Format, quantize_activations
from tests.unit.kernels.matrices import BLOCK_FORMATS, blocks_of, make_matrix, normal

block_format = pytest.mark.parametrize("form", BLOCK_FORMATS, ids=lambda form: form.name)


def test_blocks_are_as_large_as_gguf_says(form: Format) -> None:
    assert (form.block, form.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[form.name]]
    assert form.in_blocks == (form.dtype == torch.uint8) == (form not in FLOAT_FORMATS.values())
    assert form.row_bytes(form.block * 3) == form.block_bytes * 3
    assert form.row_bytes(0) == 0


def test_each_format_has_its_number() -> None:
    assert [form.number for form in FORMATS.values()] == list(range(9))


@block_format
def test_rows_are_whole_blocks(form: Format) -> None:
    for columns in (1, form.block - 1, form.block + 1):
        with pytest.raises(ValueError, match=f"{columns} weights are no whole number of blocks of {form.block}"):
            form.row_bytes(columns)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_what_gguf_quantizes_is_decoded(name: str) -> None:
    weights, form = normal(6, 96), FORMATS[name]
    stored = torch.from_numpy(quantize(weights.numpy(), GGMLQuantizationType[name]))
    step = 2 ** -(7 if name == "Q8_0" else 3)  # of the largest weight; half of it, and a little for the scale's float16
    blocks = weights.view(6, -1, 32)
    near = blocks.abs().amax(-1, keepdim=True) * step * 1.01
    assert ((form.decode(stored).view_as(blocks) - blocks).abs() <= near).all()
    assert form.decode(stored).dtype == torch.float32


def test_floats_are_decoded_as_they_are() -> None:
    for dtype, form in FLOAT_FORMATS.items():
        weights = normal(3, 5).to(dtype)
        assert torch.equal(form.decode(weights), weights.float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of infinity by 0
@block_format
def test_scales_that_are_not_finite_are_found(form: Format) -> None:
    """Each scale of each block, in any position, and no other byte."""
    matrix = make_matrix(form, 3, form.block * 2)
    assert form.finite(matrix.data)
    for value in (np.nan, np.inf, -np.inf, -np.nan):
        low, high = np.float16(value).tobytes()
        for row, block in ((0, 0), (2, 1)):
            for place in range(form.block_bytes - 1):
                data = matrix.data.clone()
                blocks = blocks_of(form, data)
                blocks[:, :, form.scales[0]] = 0  # no other scale becomes one by its neighbour's byte
                blocks[row, block, place], blocks[row, block, place + 1] = low, high
                assert form.finite(data) == bool(form.decode(data).isfinite().all()), place
                assert form.finite(data) or not form.decode(data)[row].isfinite().all()


def test_activations_are_rounded_to_127_steps_of_each_block() -> None:
    x = torch.zeros(2, 64)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    x[0, 32:36] = torch.tensor([-254.0, 1.0, 3.0, 2.9])
    rounded = quantize_activations(x)
    assert rounded.dtype == torch.float64
    assert rounded[0, :4].tolist() == [127, 0, 2, -2]
    assert rounded[0, 32:36].tolist() == [-254, 0, 4, 2]
    assert not rounded[1].any()


def test_activations_are_off_by_half_a_step() -> None:
    for size in (1e-30, 1.0, 1e30):
        x = (normal(9, 96) * size).view(9, -1, 32)
        step = x.abs().amax(-1, keepdim=True).double() / 127
        rounded = quantize_activations(x.view(9, 96)).view_as(x)
        assert ((rounded - x).abs() <= step * 0.5001).all()


def test_activations_too_small_for_a_scale_are_zeros() -> None:
    tiny = torch.finfo(torch.float32).tiny
    for size in (1e-45, 1e-40, 126 * tiny):
        assert not quantize_activations(torch.full((1, 32), size)).any()
    assert quantize_activations(torch.full((1, 32), 128 * tiny)).all()
