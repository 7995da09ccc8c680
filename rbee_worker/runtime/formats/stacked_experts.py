"""Experts that a checkpoint keeps in one tensor for a whole layer, as gpt-oss does: plain, or in MXFP4.

Plain matrices are stored as [experts, inputs, outputs], MXFP4 ones as [experts, outputs, inputs / 32, 16] bytes with
[experts, outputs, inputs / 32] exponents. In both, the outputs of gate and up alternate.

MXFP4 (OCP Microscaling Formats, version 1.0): two values of four bits a byte, the lower half first; a sign, two bits of
exponent and one of mantissa; and for each block of 32 a power of two, stored with a bias of 127.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rbee_worker.errors import ModelMalformed
from rbee_worker.escape import quoted
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.finite import check_finite

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127
_NO_SCALE = 255
"""What a scale that is NaN is stored as."""

Read = Callable[[TensorInfo, Tensor, torch.dtype], None]


def read_expert(
    tensors: Mapping[str, TensorInfo],
    role: str,
    number: int,
    read: Read,
    *,
    device: torch.device,
    held: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One matrix of one expert, float32 [outputs, inputs], and its bias [outputs]; gate comes before up.

    Args:
        tensors: the layer's, by role.
        role: ``gate_up`` or ``down``.
        number: the expert's.
        read: fills a tensor from the file.
        device: where they are to be.
        held: the dtype that the matrix will be kept in.

    Raises:
        ModelMalformed: a value is not finite.
        ModelUnsupported: a value is too large for ``held``.
    """

    def part(name: str, dtype: torch.dtype, held: torch.dtype) -> Tensor:
        info = _slice(tensors[f"experts.{name}"], number)
        target = torch.empty(info.shape, dtype=dtype, device=device)
        read(info, target, held)
        return target

    if f"experts.{role}" in tensors:
        weight = part(role, torch.float32, held).T
    else:
        blocks, scales = (part(f"{role}_{what}", torch.uint8, torch.uint8) for what in ("blocks", "scales"))
        stored = tensors[f"experts.{role}_scales"]
        if bool((scales == _NO_SCALE).any()):
            raise ModelMalformed(
                f"{stored.file.name}: tensor {quoted(stored.name)} holds a scale of {_NO_SCALE}, which is no number.",
                hint="Download the file again.",
            )
        weight = decode_mxfp4(blocks, scales)
        check_finite(stored, weight, held)
    bias = part(f"{role}_bias", torch.float32, torch.float32)
    if role == "gate_up":
        weight, bias = (torch.cat((whole[0::2], whole[1::2])) for whole in (weight, bias))
    return weight.contiguous(), bias


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """float32 [rows, 32 * blocks] from uint8 [rows, blocks, 16] and [rows, blocks]."""
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=blocks.device)
    values = table[torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).int()]
    return torch.ldexp(values, scales.int().unsqueeze(-1) - _EXPONENT_BIAS).flatten(-2)


def _slice(info: TensorInfo, number: int) -> TensorInfo:
    """One expert's part of a stored tensor."""
    stride = info.nbytes // info.shape[0]
    return replace(info, shape=info.shape[1:], offset=info.offset + number * stride, nbytes=stride)
