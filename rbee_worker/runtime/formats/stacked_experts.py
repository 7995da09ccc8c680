"""Reads experts from a checkpoint that has one tensor for all experts of a layer, as gpt-oss: plain, or in MXFP4.

Plain matrices are stored as [experts, inputs, outputs]. MXFP4 ones are stored as bytes [experts, outputs, inputs / 32,
16] with exponents [experts, outputs, inputs / 32]. In both, the outputs of gate and up alternate.

MXFP4 (OCP Microscaling Formats, version 1.0): a byte holds two values of four bits, the lower half first. A value has
a sign, two bits of exponent and one bit of mantissa. Each block of 32 values has a power of two as its scale, stored
as the exponent plus 127.
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
"""The stored byte of a scale that is NaN."""

Read = Callable[[TensorInfo, Tensor, torch.dtype], None]
"""Fills a tensor of the stored shape from the file; the dtype is the one that the values will be kept in."""


def read_expert(
    tensors: Mapping[str, TensorInfo],
    role: str,
    number: int,
    read: Read,
    *,
    device: torch.device,
    held: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Read one matrix of one expert and its bias.

    Args:
        tensors: the tensors of the layer, by role.
        role: ``gate_up`` or ``down``.
        number: which expert, from 0.
        read: fills a tensor from the file.
        device: where the results are made.
        held: the dtype that the matrix will be kept in.

    Returns:
        The matrix, float32 [outputs, inputs], and the bias, float32 [outputs]. For ``gate_up``, all outputs of gate
        come before all outputs of up.

    Raises:
        ModelMalformed: a value or a scale is not finite.
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
    """Decode MXFP4 (OCP Microscaling Formats, version 1.0).

    Args:
        blocks: uint8 [rows, blocks, 16], two values a byte.
        scales: uint8 [rows, blocks], exponents with a bias of 127; not 255.

    Returns:
        float32 [rows, 32 * blocks].
    """
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=blocks.device)
    values = table[torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).int()]
    return torch.ldexp(values, scales.int().unsqueeze(-1) - _EXPONENT_BIAS).flatten(-2)


def _slice(info: TensorInfo, number: int) -> TensorInfo:
    """One expert's part of a stored tensor."""
    stride = info.nbytes // info.shape[0]
    return replace(info, shape=info.shape[1:], offset=info.offset + number * stride, nbytes=stride)
