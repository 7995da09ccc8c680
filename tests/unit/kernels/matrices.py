"""Stored matrices made of any valid bytes, and the twin of the kernels: the same product in float64, with its bound.

The bound is the known one of float32 summation, and no tolerance. A result is a sum of products. Each operation on the
way rounds once, and changes what it yields by no more than half a unit in the last place: a factor of 1 + d, with
|d| <= u = 2^-24. Where no term passes more than n roundings, the error is at most

    n u / (1 - n u)  x  the sum of the magnitudes of all terms,

in whatever order they are added. A result below the smallest normal number is off by up to 2^-150 more. n is counted
below; there are no more roundings in AVX-512's wider registers, so that one count holds for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rbee_worker.kernels.arguments import StoredMatrix, StoredWeights
from rbee_worker.kernels.formats import FORMATS, Format, quantize_activations
from rbee_worker.kernels.library import Kernels, Variant, built, supported

VARIANTS: tuple[Variant, ...] = ("avx2", "avx512")
MISSING: dict[Variant, str] = {
    variant: f"{variant} {what}"
    for variant in VARIANTS
    for what, there in (
        ("does not run on this CPU", supported(variant)),
        ("was not built: no C++ compiler", built(variant)),
    )
    if not there
}
"""Why a variant cannot be tested here."""
HERE = [variant for variant in VARIANTS if variant not in MISSING]

BLOCK_FORMATS = [form for form in FORMATS.values() if form.in_blocks]
FLOAT_FORMATS = [form for form in FORMATS.values() if not form.in_blocks]

UNIT = 2.0**-24
TINY = 2.0**-150
"""What a rounding loses of a number below the smallest normal one, at most."""
SMALLEST = 2.0**-126
"""The smallest normal number."""

_LANES = 8
_GROUP = 256
_LARGEST_DOT = 32 * 255 * 127
"""Of a block of bytes by a block of bytes."""

QUANTS = {
    "Q8_0": slice(2, 34),
    "Q4_0": slice(2, 18),
    "Q4_1": slice(4, 20),
    "Q4_K": slice(16, 144),
    "Q5_K": slice(16, 176),
    "Q6_K": slice(0, 192),
}
"""Where a block has what the scales multiply."""
LOWEST = {"Q8_0": 0x80}
"""The byte of the lowest weights, where it is not 0: -128."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def columns_of(form: Format, near: int) -> int:
    """A width that the format can have: ``near``, or the next larger."""
    return -(-near // form.block) * form.block


def make_matrix(form: Format, rows: int, columns: int, seed: int = 0, *, shift: int = 0) -> StoredMatrix:
    """Weights of a format: normal ones, or blocks of any bytes whose scales are normal numbers, also negative ones.

    Args:
        form, rows, columns: of the matrix.
        seed: of the bytes.
        shift: elements (bytes, of blocks) before it in its storage, so that its address is no round one.
    """
    width = form.row_bytes(columns) // form.dtype.itemsize
    storage = torch.empty(shift + rows * width, dtype=form.dtype)
    data = storage[shift:].view(rows, width)
    if form.in_blocks:
        data.copy_(torch.randint(256, (rows, width), dtype=torch.uint8, generator=generator(seed)))
        set_scales(form, data, normal(rows, width // form.block_bytes, len(form.scales), seed=seed + 1) * 0.01)
    else:
        data.copy_(normal(rows, columns, seed=seed))
    return StoredMatrix(data, form, rows, columns)


def blocks_of(form: Format, data: Tensor) -> Tensor:
    """A view of the bytes: [rows, blocks, bytes of a block]."""
    return data.view(data.shape[0], data.shape[1] // form.block_bytes, form.block_bytes)


def set_scales(form: Format, data: Tensor, values: Tensor | float) -> None:
    """Write the float16 scales: [rows, blocks, of a block]."""
    if not data.numel():
        return
    blocks, places = blocks_of(form, data), form.scales
    halves = torch.as_tensor(values, dtype=torch.float16).expand(*blocks.shape[:2], len(places)).contiguous()
    of_bytes = halves.view(torch.uint8).view(*blocks.shape[:2], len(places), 2)
    for i, place in enumerate(places):
        blocks[:, :, place : place + 2] = of_bytes[:, :, i]


def decoded(matrix: StoredMatrix) -> Tensor:
    """float64 [rows, columns]."""
    return matrix.format.decode(matrix.data).double()


def lowest(matrix: StoredMatrix) -> Tensor:
    """What each weight would be with the lowest of its bits all 0: the offset of its block; float64 [rows, columns]."""
    form, data = matrix.format, matrix.data.clone()
    blocks_of(form, data)[:, :, QUANTS[form.name]] = LOWEST.get(form.name, 0)
    return form.decode(data).double()


@dataclass(frozen=True)
class Expected:
    """What a product is, and by how much each result may be off: float64 [tokens, outputs]."""

    values: Tensor
    bound: Tensor

    def check(self, y: Tensor) -> None:
        assert y.dtype == torch.float32
        assert y.shape == self.values.shape
        error = (y.double() - self.values).abs()
        wrong = ~(error <= self.bound)  # also where it is not a number
        if wrong.any():
            token, output = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"{int(wrong.sum())} of {wrong.numel()} results are wrong; of token {token} the output {output}: "
                f"{y[token, output]}, and {self.values[token, output]} was right to {self.bound[token, output]}"
            )

    def of(self, tokens: int, outputs: int) -> "Expected":
        """The first tokens and outputs."""
        return Expected(self.values[:tokens, :outputs], self.bound[:tokens, :outputs])


def multiplies_pairs(kernels: Kernels) -> bool:
    """Whether pairs of bfloat16 are multiplied by the CPU itself, and activations rounded for it."""
    return kernels.variant == "avx512" and torch.cpu.get_capabilities().get("avx512_bf16", False)


def expected(kernels: Kernels, matrices: Sequence[StoredMatrix], x: Tensor, bias: Tensor | None = None) -> Expected:
    """The twin of ``Kernels.linear``: the product in float64 by weights as ``Format.decode`` has them."""
    pairs = multiplies_pairs(kernels)
    parts = [_expected(matrix, x, pairs=pairs and matrix.columns % 2 == 0) for matrix in matrices]
    values, bound = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("values", "bound"))
    if bias is not None:
        values = values + bias.double()
        # One more rounding, of the sum of both.
        bound = bound * (1 + UNIT) + UNIT * values.abs() + TINY
    return Expected(values, bound)


def _expected(matrix: StoredMatrix, x: Tensor, *, pairs: bool) -> Expected:
    weight = decoded(matrix)
    if pairs and matrix.format.name == "BF16":
        # A step adds two products, which are exact, with a rounding for each. Numbers below the smallest normal one
        # are 0, be they weights, activations, products or sums.
        x, weight = (torch.where(v.abs() < SMALLEST, 0, v) for v in (x.bfloat16().double(), weight))
        roundings = 2 * -(-matrix.columns // (4 * _LANES)) + 4
        return Expected(
            x @ weight.T, _summed(roundings, x.abs() @ weight.abs().T) + (2 * matrix.columns + 16) * SMALLEST
        )
    if not matrix.format.in_blocks:
        # A register adds a product a step, with one rounding for both (FMA); at the end its 8 lanes are added in 3
        # steps. AVX-512 has half as many steps, and 4 at the end.
        roundings = -(-matrix.columns // _LANES) + 4
        values, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        return Expected(values, _summed(roundings, magnitude) + matrix.columns * 2 * TINY)
    # weight = scale x byte + offset, and the products of the bytes are added in integers, without error. So a block's
    # terms are  (scale x its activations' scale) x that sum,  and  offset x (its activations' scale x the sum of their
    # bytes);  Q6_K has two of each, for its half blocks. What is in brackets rounds once; then a register of 8 blocks
    # adds a term a step with one rounding, and its lanes in 3 steps. The scales themselves have no rounding.
    offset, rounded = lowest(matrix), quantize_activations(x)
    terms = 4 if matrix.format.name == "Q6_K" else 2
    roundings = 1 + terms * -(-matrix.columns // _GROUP) + 3
    magnitude = rounded.abs() @ ((weight - offset).abs() + offset.abs()).T
    # Where a product of scales is below the smallest normal number, its error is multiplied by the sum.
    return Expected(
        rounded @ weight.T, _summed(roundings, magnitude) + matrix.columns / 32 * terms * _LARGEST_DOT * TINY
    )


def _summed(roundings: int, magnitude: Tensor) -> Tensor:
    """The bound of a sum in float32; what the twin itself rounds, in float64, is added."""
    return (roundings * UNIT / (1 - roundings * UNIT) + 2.0**-40) * magnitude


def make_exact(form: Format, rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[StoredMatrix, Tensor]:
    """Weights and activations whose product has no rounding in float32: all of them are whole numbers, and small.

    Every block of activations holds one 127 or -127, so that its scale is 1, and else 1, 0 and -1.
    """
    matrix = make_matrix(form, rows, columns, seed)
    if form.in_blocks:
        set_scales(form, matrix.data, 1.0)
        if form.name == "Q6_K":  # the scales of its half blocks may be large
            scales = blocks_of(form, matrix.data)[:, :, 192:208]
            scales.copy_(
                torch.randint(-16, 17, scales.shape, generator=generator(seed + 1)).to(torch.int8).view(torch.uint8)
            )
    else:
        matrix.data.copy_(torch.randint(-8, 9, (rows, columns), generator=generator(seed + 1)))
    x = torch.randint(-1, 2, (tokens, columns), generator=generator(seed + 2)).float()
    if form.in_blocks:
        place = torch.randint(32, (tokens, columns // 32, 1), generator=generator(seed + 3))
        sign = torch.randint(2, place.shape, generator=generator(seed + 4)) * 2 - 1
        x.view(tokens, -1, 32).scatter_(2, place, 127.0 * sign)
    return matrix, x


def linear(kernels: Kernels, matrices: Sequence[StoredMatrix], x: Tensor, bias: Tensor | None = None) -> Tensor:
    return kernels.linear(x, StoredWeights(matrices), bias)
