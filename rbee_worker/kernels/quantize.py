"""Weights from numbers to the blocks that the kernels multiply by: in each block, the scale that loses the least.

Of a block the *plain* form spreads the levels from its smallest to its largest weight. That is not the best: with few
levels it pays to move them a little, and to cut off the ends. So a few other scales are tried. For the levels that a
trial chooses, least squares give the best scale and offset, in closed form. They are rounded as they are stored, the
levels are chosen once more, and what has the smallest sum of squared errors is kept. The plain form is among the
candidates, so that no block is worse than with it.

The layouts are ggml's. What is done with a block does not depend on its neighbors, but in Q4_K on those with which it
shares a scale. The arithmetic is numpy's: several threads quantize at once, each for itself.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rbee_worker.kernels.formats import Format

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

LARGEST = 65504.0
"""The largest number of float16, which scales and offsets are."""

_AT_ONCE = 2**17
"""Weights quantized at a time: they and what is computed of them stay in the cache."""

_SMALLEST = np.finfo(np.float32).tiny

_TRIALS = ((15.0, 0.0), (15.49, 0.49), (15.49, 0.0))
"""Steps from the smallest to the largest weight, and how many of them the smallest lies below the first level. Of all
pairs around (15, 0), hardly any three together leave less error in blocks of 32 normal weights; with seventy trials it
is 6 % smaller. With none of these a level is outside of 0 to 15."""

_STEPS = 15
"""Of four bits."""

_LARGEST_CODE = 63
"""Of the six bits that Q4_K has for a scale or an offset."""


def largest_weight(form: Format) -> float:
    """The largest magnitude of a weight that a format of :data:`QUANTIZED` holds."""
    return 127 * LARGEST if form.name == "Q8_0" else LARGEST


def quantize(weights: Tensor, form: Format, out: Tensor) -> None:
    """Write weights as blocks.

    Args:
        weights: float32 [rows, columns], contiguous, on the CPU, none above :func:`largest_weight`.
        form: one of :data:`QUANTIZED`.
        out: uint8 [rows, bytes of a row], contiguous.
    """
    pack = QUANTIZED[form.name]
    blocks = weights.numpy().reshape(-1, form.block)
    written = out.numpy().reshape(-1, form.block_bytes)
    step = _AT_ONCE // form.block
    # For the weights and what is as large. Memory that is new each time costs more than the arithmetic.
    whole = np.empty((4, min(step, len(blocks)) * form.block), np.float32)
    for begin in range(0, len(blocks), step):
        # The weights of a block below each other: operations on all first weights, all second ones, are fast.
        rows = blocks[begin : begin + step].reshape(-1, 32)
        w, *room = whole[:, : rows.size].reshape(4, 32, -1)
        np.copyto(w, rows.T)
        written[begin : begin + step] = pack(w, room)


def _q8_0(w: Floats, room: Sequence[Floats]) -> Bytes:
    """From [32, blocks] to [blocks, 34]. Levels are chosen by the scale as it is stored, in float16."""
    scale = _half(np.abs(w, out=room[0]).max(0) / 127)
    levels = np.rint(np.multiply(w, _inverse(scale), out=room[0]), out=room[0])
    return np.concatenate((_bytes(scale), levels.clip(-127, 127).astype(np.int8).T.view(np.uint8)), 1)


def _q4_1(w: Floats, room: Sequence[Floats]) -> Bytes:
    """From [32, blocks] to [blocks, 20]."""
    lowest = w.min(0)

    def stored(candidate: tuple[Floats, Floats], levels: Floats) -> tuple[Floats, ...]:
        scale, offset = map(_half, candidate)
        return _round(w, scale, offset, levels, room[2]), scale, offset, levels

    best = stored(_search(w, lowest, LARGEST, room), room[0])
    _, scale, offset, levels = _better(best, stored(_plain(w, lowest), room[1]))
    nibbles = levels.astype(np.uint8).T
    return np.concatenate((_bytes(scale), _bytes(offset), nibbles[:, :16] | nibbles[:, 16:] << 4), 1)


def _q4_k(w: Floats, room: Sequence[Floats]) -> Bytes:
    """From [32, 8 * blocks] to [blocks, 144]. Offsets are not positive."""
    lowest = np.minimum(w.min(0), 0)

    def stored(candidate: tuple[Floats, Floats], levels: Floats) -> tuple[Floats, ...]:
        scale, scales = _codes(candidate[0])
        offset, offsets = _codes(-candidate[1])
        error = _round(w, (scale * scales).ravel(), -(offset * offsets).ravel(), levels, room[2])
        codes = (part.T for part in (scale, offset, scales, offsets))
        return error.reshape(-1, 8).sum(1), *codes, levels.reshape(32, -1, 8).swapaxes(1, 2)

    best = stored(_search(w, lowest, 0.0, room), room[0])
    _, scale, offset, scales, offsets, levels = _better(best, stored(_plain(w, lowest), room[1]))
    nibbles = levels.astype(np.uint8).transpose(2, 1, 0)  # [blocks, 8, 32]
    pairs = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    first, second = scales.T.astype(np.uint8), offsets.T.astype(np.uint8)
    codes = (
        first[:, :4] | (first[:, 4:] >> 4) << 6,
        second[:, :4] | (second[:, 4:] >> 4) << 6,
        (first[:, 4:] & 15) | second[:, 4:] << 4,
    )
    return np.concatenate((_bytes(scale[0]), _bytes(offset[0]), *codes, pairs.reshape(len(pairs), -1)), 1)


QUANTIZED: Mapping[str, Callable[[Floats, Sequence[Floats]], Bytes]] = MappingProxyType(
    {"Q8_0": _q8_0, "Q4_1": _q4_1, "Q4_K": _q4_k}
)
"""What weights can be quantized to, by the name of the format."""


def _plain(w: Floats, lowest: Floats) -> tuple[Floats, Floats]:
    return (w.max(0) - lowest) / np.float32(_STEPS), lowest


def _search(w: Floats, lowest: Floats, largest_offset: float, room: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Scales and offsets, [blocks], before they are rounded to what can be stored."""
    count, mean = np.float32(len(w)), w.mean(0)
    span = w.max(0) - lowest
    best: tuple[Floats, ...] = ()
    for steps, below in _TRIALS:
        inverse = _inverse(span / np.float32(steps))
        levels = np.multiply(w, inverse, out=room[0])
        levels -= lowest * inverse + np.float32(below)
        np.rint(levels, out=levels)
        level_mean = levels.sum(0) / count
        squares, products = (np.einsum("ij,ij->j", levels, other) for other in (levels, w))
        variance = squares - count * level_mean * level_mean
        covariance = products - count * level_mean * mean
        scale = _ratio(covariance, variance)
        offset = mean - scale * level_mean
        # Without an offset, a scale has another optimum.
        scale = np.where(offset <= largest_offset, scale, _ratio(products, squares))
        offset = np.minimum(offset, np.float32(largest_offset))
        missed = mean - scale * level_mean - offset
        error = scale * (scale * variance - 2 * covariance) + count * missed * missed  # less the weights' own variance
        found = (error, scale, offset)
        best = _better(best, found) if best else found
    return best[1], best[2]


def _round(w: Floats, scale: Floats, offset: Floats, levels: Floats, room: Floats) -> Floats:
    """Fill ``levels`` with the nearest level of each weight; returns the sum of squared errors of each block."""
    inverse = _inverse(scale)
    np.multiply(w, inverse, out=levels)
    levels -= offset * inverse
    np.rint(levels, out=levels)
    np.clip(levels, 0, _STEPS, out=levels)
    missed = np.multiply(levels, scale, out=room)
    missed += offset
    missed -= w
    errors: Floats = np.einsum("ij,ij->j", missed, missed)
    return errors


def _better(first: tuple[Floats, ...], second: tuple[Floats, ...]) -> tuple[Floats, ...]:
    """The first candidate, but for blocks for which the second is better. Errors come first; the blocks come last."""
    chosen = np.flatnonzero(second[0] < first[0])
    for old, new in zip(first, second, strict=True):
        old[..., chosen] = new[..., chosen]
    return first


def _codes(values: Floats) -> tuple[Floats, Floats]:
    """Of values that are not negative, [8 * blocks]: what they are multiples of, [blocks, 1], and the multiples."""
    values = values.reshape(-1, 8)
    unit = _half(values.max(1, keepdims=True) / np.float32(_LARGEST_CODE))
    return unit, np.rint(values * _inverse(unit)).clip(0, _LARGEST_CODE)


def _inverse(scale: Floats) -> Floats:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale >= _SMALLEST)


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _half(values: Floats) -> Floats:
    """Rounded to float16, as float32."""
    return values.clip(-LARGEST, LARGEST).astype(np.float16).astype(np.float32)


def _bytes(values: Floats) -> Bytes:
    """Values of float16, [blocks], as uint8 [blocks, 2]."""
    return values.astype(np.float16).view(np.uint8).reshape(-1, 2)
