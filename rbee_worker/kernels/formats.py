"""How weights may be stored that the kernels multiply by as they are, and what the stored bytes are as numbers.

Names are those of the files: safetensors' dtypes and GGUF's types. The layouts of the block formats are ggml's. The
``gguf`` package is the reference.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor
from torch.nn import functional

_EXPONENT = 0x7C
"""The exponent in a float16's high byte. All its bits are set in infinity and NaN alone."""


@dataclass(frozen=True, slots=True)
class Format:
    """A form of weights in memory and in files.

    Attributes:
        name: as files have it: ``F16``, ``Q4_K``.
        number: in ``cpp/abi.h``.
        block: weights that are stored together, side by side in a row; ``block_bytes``: the bytes of a block.
        dtype: of a tensor that holds them: the weights' own, or uint8 for blocks.
        scales: where in a block its float16 scales and offsets are, in bytes from its begin.
    """

    name: str
    number: int
    block: int
    block_bytes: int
    dtype: torch.dtype = torch.uint8
    scales: tuple[int, ...] = ()

    @property
    def in_blocks(self) -> bool:
        """Whether weights are quantized in blocks; activations are then rounded to blocks of bytes."""
        return self.block > 1

    @property
    def bits(self) -> float:
        """Of a weight, with its share of the scales."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many weights.

        Raises:
            ValueError: they are no whole number of blocks.
        """
        blocks, rest = divmod(columns, self.block)
        if rest:
            raise ValueError(f"{columns} weights are no whole number of blocks of {self.block}")
        return blocks * self.block_bytes

    def finite(self, data: Tensor) -> bool:
        """Whether all scales and offsets of blocks are finite numbers.

        Args:
            data: uint8 [rows, bytes of a row], contiguous, on the CPU.
        """
        blocks = data.numpy().reshape(-1, self.block_bytes)
        high_bytes = (blocks[:, offset + 1] for offset in self.scales)  # sign, five bits of exponent, two more
        return not any(((high & _EXPONENT) == _EXPONENT).any() for high in high_bytes)

    def decode(self, data: Tensor) -> Tensor:
        """What stored rows are as numbers: the specification of the kernels.

        Args:
            data: as :class:`~rbee_worker.kernels.arguments.StoredMatrix` holds it.

        Returns:
            float32 [rows, columns].
        """
        if not self.in_blocks:
            return data.float()
        values = dequantize(data.numpy(), GGMLQuantizationType[self.name])
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        found.name: found
        for found in (
            Format("F32", 0, 1, 4, torch.float32),
            Format("F16", 1, 1, 2, torch.float16),
            Format("BF16", 2, 1, 2, torch.bfloat16),
            Format("Q8_0", 3, 32, 34, scales=(0,)),
            Format("Q4_0", 4, 32, 18, scales=(0,)),
            Format("Q4_1", 5, 32, 20, scales=(0, 2)),
            Format("Q4_K", 6, 256, 144, scales=(0, 2)),
            Format("Q5_K", 7, 256, 176, scales=(0, 2)),
            Format("Q6_K", 8, 256, 210, scales=(208,)),
        )
    }
)
"""By name."""

FLOAT_FORMATS: Mapping[torch.dtype, Format] = MappingProxyType(
    {found.dtype: found for found in FORMATS.values() if not found.in_blocks}
)
"""By the dtype of the weights."""


_FAR_ABOVE = 1.5
"""A scale so many times the mean of its token's is that of an outlier."""

_TOGETHER = 4
"""Blocks that are refined together."""


def quantize_activations(x: Tensor) -> Tensor:
    """What the block formats make of activations: bytes in blocks of 32, with a scale each.

    ``scale = max |x| / 127`` and ``round(x * (1 / scale))``, half to even, in float32. Where a scale is more than 1.5
    times the mean of the token's, the four blocks around it get a second byte in the same way, for what the
    first one left.

    Args:
        x: float32 [tokens, columns], columns a multiple of 32.

    Returns:
        The values that are multiplied by weights, float64 [tokens, columns].
    """
    blocks = x.reshape(x.shape[0], -1, 32)
    coarse, scale = _to_bytes(blocks)
    fine, _ = _to_bytes((blocks.double() - coarse).float())
    outlying = scale[..., 0].double() * scale.shape[1] > _FAR_ABOVE * scale[..., 0].double().sum(-1, keepdim=True)
    whole = functional.pad(outlying, (0, -outlying.shape[1] % _TOGETHER)).view(x.shape[0], -1, _TOGETHER)
    refined = whole.any(-1, keepdim=True).expand(whole.shape).flatten(1)[:, : outlying.shape[1], None]
    return torch.where(refined, coarse + fine, coarse).view(x.shape)


def _to_bytes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, 0)
    return (blocks * inverse).round().double() * scale, scale
