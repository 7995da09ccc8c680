"""Rotary position embedding (arXiv:2104.09864): frequencies for every scaling, tables, and the rotation itself."""

import math

import torch
from torch import Tensor

from rbee_worker.kernels.arguments import RotaryTables
from rbee_worker.runtime.architecture.config import ModelConfig, RopeScaling

_ROWS = 2**14
"""Rows that are computed at a time: what is between angles and tables takes several times their memory."""

Tables = tuple[Tensor, Tensor]
"""Cosines and signed sines of a step's positions, each [tokens, 1, rotary_dim]."""


class Rotary:
    """Cosines and signed sines for every position up to the context length, float32 [rows, rotary_dim].

    A row is a position. Of LongRoPE with more than the trained context, those for sequences within it come first, and
    behind them those for longer ones.

    In the half-split layout ``x = [a, b]`` becomes ``[a cos - b sin, b cos + a sin]``, which is
    ``x * cos + swap(x) * [-sin, sin]``; in the interleaved one (Cohere) neighbours are swapped instead of halves.
    """

    __slots__ = ("_cos", "_interleaved", "_sin")

    def __init__(
        self, rope: RopeScaling, rotary_dim: int, positions: int, device: torch.device, *, interleaved: bool = False
    ) -> None:
        parts = [(positions, inverse_frequencies(rope, rotary_dim, positions))]
        if rope.kind == "longrope" and positions > rope.original_max_positions:
            parts.insert(0, (rope.original_max_positions, inverse_frequencies(rope, rotary_dim)))
        self._interleaved = interleaved
        self._cos, self._sin = (
            torch.empty(sum(count for count, _ in parts), rotary_dim, device=device) for _ in range(2)
        )
        row = 0
        for count, frequencies in parts:
            for begin in range(0, count, _ROWS):
                end = min(begin + _ROWS, count)
                angles = torch.outer(torch.arange(begin, end).float(), frequencies)
                self._fill(slice(row + begin, row + end), angles, rope.attention_factor)
            row += count

    def _fill(self, rows: slice, angles: Tensor, factor: float) -> None:
        cos, sin = angles.cos() * factor, angles.sin() * factor
        if self._interleaved:
            self._cos[rows] = cos.repeat_interleave(2, dim=-1).to(self._cos.device)
            self._sin[rows] = torch.stack((-sin, sin), dim=-1).flatten(-2).to(self._sin.device)
        else:
            self._cos[rows] = torch.cat((cos, cos), dim=-1).to(self._cos.device)
            self._sin[rows] = torch.cat((-sin, sin), dim=-1).to(self._sin.device)

    def at(self, rows: Tensor, dtype: torch.dtype) -> Tables:
        """Tables for int64 rows [tokens]: cos and signed sin, each [tokens, 1, rotary_dim]."""
        cos, sin = self._cos[rows].unsqueeze(1), self._sin[rows].unsqueeze(1)
        return cos.to(dtype), sin.to(dtype)

    def whole(self, rows: Tensor) -> RotaryTables:
        """All of the tables, and int64 rows [tokens] of them, for the worker's own kernels."""
        return RotaryTables(self._cos, self._sin, rows, interleaved=self._interleaved)


def rotaries(config: ModelConfig, positions: int, device: torch.device) -> tuple[Rotary, ...]:
    """The model's rotary embedding and, where it has one, that of its layers with windows."""
    kinds = [config.rope, *([config.local_rope] if config.local_rope is not None else [])]
    size, interleaved = config.rotary_dim, config.rope_interleaved
    return tuple(Rotary(rope, size, positions, device, interleaved=interleaved) for rope in kinds)


def rotate(x: Tensor, tables: Tables, *, interleaved: bool) -> Tensor:
    """Rotate the first rotary_dim dimensions of queries and keys [tokens, heads, head_dim]."""
    rotated = rotate_neighbours if interleaved else rotate_halves
    size = tables[0].shape[-1]
    if size == x.shape[-1]:
        return rotated(x, tables)
    return torch.cat((rotated(x[..., :size], tables), x[..., size:]), dim=-1)


def rotate_halves(x: Tensor, tables: Tables) -> Tensor:
    """Rotate x [tokens, heads, rotary_dim]; dimension ``i`` is paired with ``i + rotary_dim / 2``."""
    cos, sin = tables
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_neighbours(x: Tensor, tables: Tables) -> Tensor:
    """Rotate x [tokens, heads, rotary_dim]; dimension ``2i`` is paired with ``2i + 1``."""
    cos, sin = tables
    return torch.addcmul(x * cos, x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2), sin)


def inverse_frequencies(rope: RopeScaling, rotary_dim: int, positions: int = 0) -> Tensor:
    """Angle per position of each pair of dimensions, float32 [rotary_dim / 2].

    ``default``: ``theta^(-2i/rotary_dim)``. The others:

    - ``linear`` divides all by ``factor``.
    - ``dynamic`` (NTK-aware): within the trained context as default; a longer one of ``positions`` raises theta by
      ``(factor * positions / trained - factor + 1)^(dim / (dim - 2))``.
    - ``llama3`` divides those whose wavelength exceeds ``trained / low_freq_factor`` by ``factor``, keeps those below
      ``trained / high_freq_factor``, and interpolates between.
    - ``yarn`` (arXiv:2309.00071) does so between the pairs that turn ``beta_slow`` and ``beta_fast`` times in the
      trained context.
    - ``longrope`` (arXiv:2402.13753) divides each by a factor of its own: ``short_factor`` for sequences within the
      trained context (``positions``), ``long_factor`` for longer ones.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    theta = rope.theta
    if rope.kind == "dynamic" and positions > rope.original_max_positions:
        stretch = rope.factor * positions / rope.original_max_positions - rope.factor + 1
        theta *= stretch ** (rotary_dim / (rotary_dim - 2))
    frequencies = 1.0 / (theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        rotations = rope.original_max_positions * frequencies / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        return _blend(frequencies, rope.factor, ((rotations - rope.low_freq_factor) / span).clamp(0, 1))
    if rope.kind == "yarn":
        return _blend(frequencies, rope.factor, 1 - _yarn_ramp(rope, rotary_dim))
    if rope.kind == "longrope":
        long = positions > rope.original_max_positions
        return frequencies / torch.tensor(rope.long_factor if long else rope.short_factor)
    return frequencies


def _blend(frequencies: Tensor, factor: float, keep: Tensor) -> Tensor:
    """Each frequency as it is, as far as ``keep`` says, and divided by the factor for the rest."""
    return keep * frequencies + (1 - keep) * frequencies / factor


def _yarn_ramp(rope: RopeScaling, rotary_dim: int) -> Tensor:
    """0 for the pairs that turn often enough to be kept, 1 for those that hardly turn: float32 [rotary_dim / 2]."""

    def pair_of(turns: float) -> float:
        spread = math.log(rope.original_max_positions / (turns * 2 * math.pi))
        return rotary_dim * spread / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
