"""Parts of the decoder that hold no large weights: RMS norm and rotary embedding."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.runtime.model_config import ModelConfig, RopeScaling


class RMSNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv:1910.07467)."""

    __slots__ = ("_eps", "_shape", "nbytes", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.nbytes = weight.nbytes
        self._eps = eps
        self._shape = (weight.shape[0],)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self._shape, self.weight, self._eps)


class Rotary:
    """Rotary position embedding (arXiv:2104.09864) in the half-split layout that Hugging Face checkpoints use.

    The tables hold ``cos`` and signed ``sin`` for every position up to the context length, float32
    [positions, head_dim]: with ``x = [a, b]`` split in halves, ``[a cos - b sin, b cos + a sin]`` is
    ``x * cos + swap(x) * [-sin, sin]``.
    """

    __slots__ = ("_cos", "_sin")

    def __init__(self, config: ModelConfig, positions: int, device: torch.device) -> None:
        frequencies = inverse_frequencies(config.rope, config.head_dim)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat((cos, cos), dim=-1).to(device)
        self._sin = torch.cat((-sin, sin), dim=-1).to(device)

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables for int64 positions [tokens]: cos and signed sin, each [tokens, 1, head_dim]."""
        cos, sin = self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)
        return cos.to(dtype), sin.to(dtype)

    @staticmethod
    def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate x [tokens, heads, head_dim] by the tables of its positions."""
        cos, sin = tables
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def inverse_frequencies(rope: RopeScaling, head_dim: int) -> Tensor:
    """Angle per position of each pair of dimensions, float32 [head_dim / 2].

    ``default``: ``theta^(-2i/head_dim)``. ``linear`` divides all by ``factor``. ``llama3`` (Llama 3.1's config key
    ``rope_type``) divides those whose wavelength exceeds ``original_max / low_freq_factor`` by ``factor``, keeps
    those below ``original_max / high_freq_factor``, and interpolates between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        rotations = rope.original_max_positions / wavelengths
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = ((rotations - rope.low_freq_factor) / span).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / rope.factor
    return frequencies
