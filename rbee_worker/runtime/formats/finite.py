"""Finds numbers that are not finite: in weights while they are read, in logits before a token is chosen.

A float's bits can be read as an integer. For positive floats the integer grows with the number, and the integers of
infinity and NaN are above all others. So two maxima tell whether all numbers are finite, or within a bound. The
maximum of the bits as signed integers belongs to the largest positive number. The maximum as unsigned integers belongs
to the negative number of largest magnitude. On weights in the processor's cache both take 25 microseconds a MiB;
``torch.isfinite`` takes 1000.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rbee_worker.errors import ModelError, ModelMalformed, ModelUnsupported
from rbee_worker.escape import quoted
from rbee_worker.runtime.formats.checkpoint import TensorInfo

_NOT_FINITE: Mapping[torch.dtype, int] = MappingProxyType(
    {
        torch.float64: 0x7FF0_0000_0000_0000,
        torch.float32: 0x7F80_0000,
        torch.float16: 0x7C00,
        torch.bfloat16: 0x7F80,
        torch.float8_e5m2: 0x7C,
        torch.float8_e4m3fn: 0x7F,
    }
)
"""The lowest positive bits that are not a finite number: those of infinity, or of NaN in a dtype without infinity."""

_TOO_LARGE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float16: 65520.0, torch.bfloat16: 2.0**128 - 2.0**119, torch.float32: 2.0**128 - 2.0**103}
)
"""The smallest number that rounds to infinity in each dtype."""

_DEVICE_NUMBERS = 2**24
"""Numbers checked at once on a device. The check takes a few bytes of memory for each."""


def all_finite(values: Tensor) -> bool:
    """Whether all numbers are finite. ``values``: contiguous, of any floating dtype and shape, on any device."""
    if values.device.type == "cpu":
        return _all_below(values, _NOT_FINITE[values.dtype])
    pieces = [piece.isfinite().all() for piece in torch.split(values.view(-1), _DEVICE_NUMBERS)]
    return bool(torch.stack(pieces).all())


def check_finite(info: TensorInfo, values: Tensor, held: torch.dtype) -> None:
    """Check weights that have just been read.

    Args:
        info: the tensor that the values belong to.
        values: all or some of its values: contiguous, on any device. Integers always pass.
        held: the dtype that the values will be kept in.

    Raises:
        ModelMalformed: a value is not finite.
        ModelUnsupported: a value is too large for ``held``.
    """
    if not values.is_floating_point():
        return
    if values.device.type != "cpu":
        if all_finite(values.to(held)):
            return
        values = values.cpu()
    bound = _bound(values.dtype, held)
    if not _all_below(values, bound):
        raise _problem(info, values.view(-1), held, bound)


def _all_below(values: Tensor, bound: int) -> bool:
    """Whether the bits of every number, without the sign bit, are below ``bound``."""
    if not values.numel():
        return True
    signed, unsigned = _bits(values)
    return bool(signed.max() < bound and unsigned.max() < bound + _sign(values))


def _bits(values: Tensor) -> tuple[npt.NDArray[np.signedinteger[Any]], npt.NDArray[np.unsignedinteger[Any]]]:
    raw = values.view(-1).view(torch.uint8).numpy()
    return raw.view(f"i{values.itemsize}"), raw.view(f"u{values.itemsize}")


def _sign(values: Tensor) -> int:
    return 1 << (8 * values.itemsize - 1)


@functools.cache
def _bound(stored: torch.dtype, held: torch.dtype) -> int:
    """The lowest positive bits, in the stored dtype, of a number that the held dtype cannot hold."""
    largest = _TOO_LARGE.get(held)
    if largest is None or torch.finfo(stored).max < largest:
        return _NOT_FINITE[stored]
    signed, _ = _bits(torch.tensor([largest], dtype=torch.float64).to(stored))
    return int(signed[0])


def _problem(info: TensorInfo, values: Tensor, held: torch.dtype, bound: int) -> ModelError:
    where = f"{info.file.name}: tensor {quoted(info.name)}"
    _, unsigned = _bits(values)
    magnitudes = unsigned & unsigned.dtype.type(_sign(values) - 1)
    infinite = np.flatnonzero(magnitudes >= _NOT_FINITE[values.dtype])
    if len(infinite):
        first = values[int(infinite[0])].item()
        return ModelMalformed(
            f"{where} holds numbers that are not finite: {len(infinite)} of the {values.numel()} that were read "
            f"together, the first of them {first}.",
            hint="Download the file again; if it is as its maker wrote it, the model was damaged when it was made.",
        )
    worst = values[int(magnitudes.argmax())].item()
    fits = [_name(dtype) for dtype in (torch.bfloat16, torch.float32) if abs(worst) < _TOO_LARGE[dtype]]
    return ModelUnsupported(
        f"{where} holds {worst:g}, too large for {_name(held)} (at most {torch.finfo(held).max:g}; "
        f"{int((magnitudes >= bound).sum())} of the {values.numel()} numbers that were read together).",
        hint=f"Load the model in {' or '.join(fits)}." if fits else None,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
