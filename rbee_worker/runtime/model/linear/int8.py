"""int8 weights: one scale per output channel, one scale per token for the activations, sums in integers.

A few channels of a decoder's activations are a hundred times the others, and one scale for a token would leave those
others no levels. Both sides are therefore rotated first, which changes no product: blocks of n columns (n <= 64, the
largest power of two that divides their number) are multiplied by the Hadamard matrix H of +1 and -1, for which
H H^T = n I; an outlier is then spread over its block. (Rotation before quantization: QuaRot, arXiv:2404.00456.)

With w[o, :] the weights of output o and x[t, :] the activations of token t::

    w' = w H / n      s[o] = max |w'[o]| / 127       q[o] = round(w'[o] / s[o])              once, at load
    c[t] = max |x[t]| / (2^17 - 1)                   m[t] = round(x[t] / c[t]) H             at each call
    a[t] = max |m[t]| / L                            r[t] = round(m[t] / a[t])
    y[t, o] = (r[t] . q[o]) s[o] a[t] c[t] + b[o]

Rounding is half to even. Both sums, of at most 64 integers below 2^17 and of products of integers, are exact, and all
else is elementwise, so that the result of a token is the same bits alone, in any batch and beside any neighbour,
whichever of the products below makes the sum.

``packed-int8``: FBGEMM on x86 CPUs. L is 127 where it multiplies 8-bit by 8-bit exactly (AVX512-VNNI) and 63 elsewhere:
``vpmaddubsw`` adds two products in 16 bits and saturates, which 2 x 127 x 127 never makes it do.
``int8``: ``torch._int_mm`` on CUDA, L = 127. ``plain-int8``: float32 matrix products over blocks of columns so short
that their sums stay exact, L = 127; it converts the weights at every call and is there for CPUs that have no other.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 127
"""The largest magnitude of a quantized weight, and of an activation where nothing asks for less."""

REDUCED_LEVELS = 63
"""The same for CPUs whose FBGEMM is not exact with 127."""

_FINE_LEVELS = 2**17 - 1
"""Magnitude of an activation while it is rotated: 64 of them add up to less than 2^24, exactly, in float32."""

_LARGEST_ROTATION = 64
_SMALLEST = 1e-30
"""Rows whose largest magnitude is below this are quantized as if it were this."""

_BLOCK_WEIGHTS = 2**18
"""Weights quantized at a time: their float32 intermediates stay in the cache."""

_EXACT_COLUMNS = 1024
"""Columns of which a float32 sum of products of magnitude 127 x 127 is an exact integer: it stays below 2^24."""

_INT_MM_MULTIPLE = 8
_INT_MM_ROWS = 24
"""``torch._int_mm`` on CUDA takes more than 16 rows, and multiples of 8 on either side."""

Product = Callable[[Tensor], Tensor]
"""From integers r held in float32 [tokens, in] to ``(r q^T) s``, float32 [tokens, out]."""


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Round each row of x [rows, columns] to integers in [-levels, levels].

    Returns:
        The integers, as float32 [rows, columns], and the scales, float32 [rows, 1], that they are multiples of.
    """
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp_min_(_SMALLEST).mul_(1 / levels)
    return torch.div(x, scale).round_(), scale


def hadamard(columns: int, device: torch.device) -> Tensor:
    """Sylvester's matrix of +1 and -1, float32 [n, n]; n: the largest power of two, up to 64, dividing ``columns``."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < min(columns & -columns, _LARGEST_ROTATION):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def quantize_weight(weight: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [out, in] of any floating dtype, rotated, as int8 [out, in] and their scales, float32 [out]."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = max(1, _BLOCK_WEIGHTS // weight.shape[1])
    for begin in range(0, weight.shape[0], step):
        rows, scale = quantize_rows(rotate(weight[begin : begin + step].float(), rotation), LEVELS)
        values[begin : begin + step] = rows
        scales[begin : begin + step] = scale[:, 0] / rotation.shape[0]
    return values, scales


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply each block of columns of x, float32 [rows, columns], by ``rotation``, symmetric [n, n]."""
    return torch.mm(x.reshape(-1, rotation.shape[0]), rotation).view_as(x)


class Int8Linear:
    """int8 weights and activations of x's dtype; see the formula above.

    Attributes:
        levels: L, the largest magnitude of a quantized activation.
        nbytes: bytes that weights, scales and bias take.
    """

    __slots__ = ("_bias", "_product", "_rotation", "levels", "nbytes")

    def __init__(self, weight: Tensor, bias: Tensor | None, kernel: str, levels: int) -> None:
        self._rotation = hadamard(weight.shape[1], weight.device)
        values, scale = quantize_weight(weight, self._rotation)
        self.levels = levels
        self._product: Product
        if kernel == "packed-int8":
            self._product = fbgemm_product(values, scale, self.levels)
        elif kernel == "int8" and all(size % _INT_MM_MULTIPLE == 0 for size in weight.shape):
            self._product = int_mm_product(values, scale)
        else:
            self._product = plain_product(values, scale)
        self._bias = bias.float() if bias is not None else None
        self.nbytes = int8_bytes(weight.shape[0], weight.shape[1], kernel)
        self.nbytes += self._bias.nbytes if self._bias is not None else 0

    def __call__(self, x: Tensor) -> Tensor:
        fine, fine_scale = quantize_rows(x, _FINE_LEVELS)
        rows, scale = quantize_rows(rotate(fine, self._rotation), self.levels)
        out = self._product(rows) * scale.mul_(fine_scale)
        if self._bias is not None:
            out += self._bias
        return out.to(x.dtype)


def int8_bytes(out_features: int, in_features: int, kernel: str) -> int:
    """Bytes of a matrix [out, in] at rest: FBGEMM keeps a zero point and a sum for each channel beside its scale."""
    per_channel = 12 if kernel == "packed-int8" else 4
    return out_features * (in_features + per_channel)


def fbgemm_product(values: Tensor, scale: Tensor, levels: int) -> Product:
    """FBGEMM's dynamic int8 product, fed with integers.

    It chooses one scale and zero point from the smallest and the largest number of the whole batch. A last row that
    holds the ends of the integer range, -(levels + 1) and levels, makes that scale exactly 1 whatever the batch holds.
    """
    packed = _pack(values, scale)
    ends = torch.zeros(1, values.shape[1])
    ends[0, 0], ends[0, 1] = -(levels + 1), levels
    reduce_range = levels < LEVELS

    def product(rows: Tensor) -> Tensor:
        # A row that is not a number would take the range with it; its own result is one by its scale.
        batch = torch.cat((rows.nan_to_num(), ends))
        out: Tensor = torch.ops.quantized.linear_dynamic(batch, packed, reduce_range)
        return out[:-1]

    return product


def int_mm_product(values: Tensor, scale: Tensor) -> Product:
    """``torch._int_mm`` with the rows that it wants at least; those added are zero and cut off again."""
    transposed = values.t()

    def product(rows: Tensor) -> Tensor:
        count = rows.shape[0]
        wanted = max(_INT_MM_ROWS, -(-count // _INT_MM_MULTIPLE) * _INT_MM_MULTIPLE)
        padded = functional.pad(rows.to(torch.int8), (0, 0, 0, wanted - count))
        sums: Tensor = torch._int_mm(padded, transposed)  # noqa: SLF001  (no public name)
        return sums[:count].float() * scale

    return product


def plain_product(values: Tensor, scale: Tensor) -> Product:
    """The same sums from float32 matrix products, block of columns by block of columns."""
    blocks = torch.split(values, _EXACT_COLUMNS, dim=1)

    def product(rows: Tensor) -> Tensor:
        sums = torch.zeros(rows.shape[0], values.shape[0], dtype=torch.int32, device=rows.device)
        for part, block in zip(torch.split(rows, _EXACT_COLUMNS, dim=1), blocks, strict=True):
            sums += functional.linear(part, block.float()).to(torch.int32)
        return sums.float() * scale

    return product


def _pack(values: Tensor, scale: Tensor) -> object:
    zero_points = torch.zeros(scale.shape, dtype=torch.int64)
    make = torch._make_per_channel_quantized_tensor  # noqa: SLF001  (no public name)
    return torch.ops.quantized.linear_prepack(make(values, scale.double(), zero_points, 0), None)
