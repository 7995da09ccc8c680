"""Computes the values of quantized tensors while they are read, a block of rows at a time."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rbee_worker.errors import ModelMalformed
from rbee_worker.escape import quoted
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.finite import check_finite
from rbee_worker.runtime.formats.quantized.tensor import WORD_BITS, Codebook, Grouped, QuantizedTensor

_WEIGHTS = 2**20
"""Weights that are computed at once. Each needs about a dozen bytes of memory meanwhile."""

_AWQ_OUTPUTS = 8
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""The position, in bits, of each of the eight outputs in a word."""

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}

ReadBytes = Callable[[TensorInfo, Tensor, int, bool], None]
"""Fills a uint8 tensor on the host with a stored tensor's bytes from an offset on. The flag: they count as progress."""

Decode = Callable[[Tensor, int, int], Tensor]
"""(packed values, begin, end) -> float32 [end - begin, inputs]: these rows of the whole matrix."""


def read_dequantized(info: QuantizedTensor, target: Tensor, held: torch.dtype, read: ReadBytes) -> None:
    """Fill ``target`` with the values of a quantized tensor.

    Args:
        info: the tensor, or a range of its rows.
        target: of ``info.shape``, of any floating dtype, on any device.
        held: the dtype that the values will be kept in.
        read: reads from the files.

    Raises:
        ModelMalformed: what was read contradicts the headers, or a value is not finite.
        ModelUnsupported: a value is too large for ``held``.
    """
    small = {  # read again for each range of rows, but counted as progress only once
        role: _whole(part, read, counted=info.first == 0) for role, part in info.parts.items() if role != "weight"
    }
    scheme = info.scheme
    decode: Decode = _grouped(info, scheme, small) if isinstance(scheme, Grouped) else _indexed(info, scheme, small)
    rows, columns = info.shape
    last = info.first + rows
    fetch, unit = _packed_values(info, read)
    step = max(1, _WEIGHTS // (columns * unit)) * unit
    for begin in range(info.first // unit * unit, last, step):
        end = min(begin + step, -(-last // unit) * unit)
        values = decode(fetch(begin, end), begin, end)
        check_finite(info, values, held)
        low, high = max(begin, info.first), min(end, last)
        target[low - info.first : high - info.first].copy_(values[low - begin : high - begin])


def _whole(part: TensorInfo, read: ReadBytes, *, counted: bool) -> Tensor:
    raw = torch.empty(part.nbytes, dtype=torch.uint8)
    read(part, raw, 0, counted)
    return raw.view(_DTYPES[part.dtype]).view(part.shape)


def _packed_values(info: QuantizedTensor, read: ReadBytes) -> tuple[Callable[[int, int], Tensor], int]:
    """A function that gives the packed values of a range of rows, and how many rows are packed together.

    Where a row of the matrix is a row of the file, each range is read when it is needed. Where a row of the matrix is a
    column of the file, all of ``info`` is read at once, and each range is a part of that.
    """
    weight, scheme = info.parts["weight"], info.scheme
    if isinstance(scheme, Codebook) or scheme.packing in {"plain", "rows"}:
        dtype = torch.uint8 if isinstance(scheme, Codebook) else _DTYPES[weight.dtype]
        stride = weight.nbytes // info.outputs

        def fetch(begin: int, end: int) -> Tensor:
            raw = torch.empty((end - begin) * stride, dtype=torch.uint8)
            read(weight, raw, begin * stride, True)
            return raw.view(dtype).view(end - begin, -1)

        return fetch, 1
    unit = _AWQ_OUTPUTS if scheme.packing == "awq" else 1
    first, last = info.first // unit, -(-(info.first + info.shape[0]) // unit)
    held = _columns(weight, first, last, read)

    def part(begin: int, end: int) -> Tensor:
        return held[:, begin // unit - first : end // unit - first]

    return part, unit


def _columns(weight: TensorInfo, first: int, last: int, read: ReadBytes) -> Tensor:
    """Columns ``first`` to ``last`` of an int32 matrix. They are read row by row, unless they are the whole matrix."""
    rows, columns = weight.shape
    held = torch.empty((rows, last - first), dtype=torch.int32)
    raw = held.view(torch.uint8)
    if last - first == columns:
        read(weight, raw.view(-1), 0, True)
        return held
    for row in range(rows):
        read(weight, raw[row], (row * columns + first) * 4, True)
    return held


def _unpack(words: Tensor, bits: int, dim: int, shifts: tuple[int, ...] = ()) -> Tensor:
    """Split int32 words into int32 values of ``bits`` bits. A word's values follow each other along ``dim``.

    ``shifts``: the position of each value in its word; by default the lowest bits come first.
    """
    shift = torch.tensor(shifts or range(0, WORD_BITS, bits), dtype=torch.int32)
    shape = (1, -1, 1) if dim == 0 else (1, 1, -1)
    values = words.unsqueeze(dim + 1) >> shift.view(shape)
    return values.bitwise_and_(2**bits - 1).flatten(dim, dim + 1)


def _grouped(info: QuantizedTensor, scheme: Grouped, small: Mapping[str, Tensor]) -> Decode:
    columns, high = info.shape[1], scheme.block[0]
    if "shape" in small and small["shape"].tolist() != [info.outputs, columns]:
        shape = info.parts["shape"]
        raise ModelMalformed(
            f"{shape.file.name}: tensor {quoted(shape.name)} says {small['shape'].tolist()}; the packed values are "
            f"{[info.outputs, columns]}."
        )
    scale = small["scale"].float()
    scale = scale.T if scheme.transposed else scale.reshape(-(-info.outputs // high), -1)
    if scheme.divisor != 1:
        scale = scale / scheme.divisor
    zero = _zeros(scheme, small["zero"], scale) if "zero" in small else None
    group = _group_of_inputs(info, scheme, small.get("order"), scale.shape[1])

    def decode(packed: Tensor, begin: int, end: int) -> Tensor:
        if scheme.packing == "plain":
            values = packed.float()
        elif scheme.packing == "rows":
            values = _unpack(packed, scheme.bits, 1).float()
        else:
            along, shifts = (0, ()) if scheme.packing == "columns" else (1, _AWQ_SHIFTS)
            values = _unpack(packed, scheme.bits, along, shifts).to(torch.uint8).T.float().contiguous()
        if scheme.centre:
            values -= scheme.centre
        rows = torch.arange(begin, end) // high
        if zero is not None:
            into, by = _aligned(values, zero[rows], group)
            into -= by
        into, by = _aligned(values, scale[rows], group)
        into *= by
        return values

    return decode


def _aligned(values: Tensor, grid: Tensor, group: Tensor | int) -> tuple[Tensor, Tensor]:
    """Values [rows, inputs] and a grid [rows, groups], as two tensors whose shapes broadcast."""
    if isinstance(group, int):
        return values.view(len(values), -1, group), grid.unsqueeze(-1)
    return values, grid[:, group]


def _group_of_inputs(info: QuantizedTensor, scheme: Grouped, order: Tensor | None, groups: int) -> Tensor | int:
    """The group of each input, int64 [inputs]; or the size of a group, where groups are neighbors of equal size.

    Raises:
        ModelMalformed: ``order`` names a group that does not exist.
    """
    columns, wide = info.shape[1], min(scheme.block[1], info.shape[1])
    regular = torch.arange(columns) // wide
    if order is not None and not bool((order == -1).all()):  # compressed-tensors: all -1 means in order
        lowest, highest = int(order.min()), int(order.max())
        if lowest < 0 or highest >= groups:
            part = info.parts["order"]
            raise ModelMalformed(
                f"{part.file.name}: tensor {quoted(part.name)} names group {lowest if lowest < 0 else highest}; "
                f"there are {groups}."
            )
        if not torch.equal(order.long(), regular):
            return order.long()
    return regular if columns % wide else wide


def _zeros(scheme: Grouped, stored: Tensor, scale: Tensor) -> Tensor:
    """Zero points, float32 of the shape of ``scale``: [outputs, groups]."""
    rows, groups = scale.shape
    if scheme.zeros == "plain":
        return stored.float().view(rows, groups)
    if scheme.zeros == "columns":
        return _unpack(stored, scheme.bits, 0)[:rows].float() - scheme.centre
    shifts = _AWQ_SHIFTS if scheme.zeros == "awq" else ()
    values: Tensor = _unpack(stored, scheme.bits, 1, shifts)[:, :rows].T
    return values.add(scheme.zero_offset).bitwise_and(2**scheme.bits - 1).float()


def _indexed(info: QuantizedTensor, scheme: Codebook, small: Mapping[str, Tensor]) -> Decode:
    columns, absmax = info.shape[1], small["absmax"]
    if scheme.nested_block:
        nested = small["nested_absmax"].repeat_interleave(scheme.nested_block)[: len(absmax)]
        absmax = small["nested_map"][absmax.int()] * nested + scheme.nested_offset
    # The table of all bytes: a byte gives its two values in one look-up.
    pairs: Tensor = torch.cartesian_prod(small["map"], small["map"])

    def decode(packed: Tensor, begin: int, end: int) -> Tensor:
        values = pairs[packed.int()].view(end - begin, columns)
        if columns % scheme.block == 0:
            of_row = columns // scheme.block
            blocks, by = _aligned(values, absmax[begin * of_row : end * of_row].view(-1, of_row), scheme.block)
            blocks *= by
            return values
        values *= absmax[torch.arange(begin * columns, end * columns) // scheme.block].view(-1, columns)
        return values

    return decode
