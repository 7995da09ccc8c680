"""Parts of a layer that hold no large weights: norms and activations."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.runtime.architecture.config import Activation, ModelConfig, NormKind


class Norm(Protocol):
    """Maps [..., width] to the same shape and dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...


class RMSNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv:1910.07467)."""

    __slots__ = ("_eps", "_shape", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self._eps = eps
        self._shape = (weight.shape[0],)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self._shape, self.weight, self._eps)


class OffsetRMSNorm:
    """Gemma's RMS norm: the weights, stored as differences from one, are applied in float32."""

    __slots__ = ("_eps", "_shape", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight.float() + 1
        self._eps = eps
        self._shape = (weight.shape[0],)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self._shape, self.weight, self._eps).to(x.dtype)


class LayerNorm:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension (arXiv:1607.06450)."""

    __slots__ = ("_bias", "_eps", "_shape", "weight")

    def __init__(self, weight: Tensor, eps: float, bias: Tensor | None = None) -> None:
        self.weight, self._bias = weight, bias
        self._eps = eps
        self._shape = (weight.shape[0],)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self._shape, self.weight, self._bias, self._eps)


class HeadNorm:
    """Norms each head by itself: weights [heads, head_dim], x [tokens, heads, head_dim]."""

    __slots__ = ("_eps", "_layer", "_shape", "weight")

    def __init__(self, weight: Tensor, eps: float, kind: NormKind) -> None:
        self._layer = kind == "layer"
        self.weight = weight.float() + 1 if kind == "rms-offset" else weight
        self._eps = eps
        self._shape = (weight.shape[1],)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        if self._layer:
            normed = functional.layer_norm(wide, self._shape, eps=self._eps)
        else:
            normed = functional.rms_norm(wide, self._shape, eps=self._eps)
        return (normed * self.weight).to(x.dtype)


def make_norm(config: ModelConfig, weight: Tensor, bias: Tensor | None = None) -> Norm:
    """The kind of norm that the model has."""
    if config.norm == "layer":
        return LayerNorm(weight, config.norm_eps, bias)
    return (OffsetRMSNorm if config.norm == "rms-offset" else RMSNorm)(weight, config.norm_eps)


def norm_or_nothing(config: ModelConfig, vectors: Mapping[str, Tensor], role: str) -> Norm:
    """The norm of a role; the identity where the model has none there."""
    weight = vectors.get(f"{role}.weight")
    return unchanged if weight is None else make_norm(config, weight, vectors.get(f"{role}.bias"))


def query_key_norm(config: ModelConfig, vectors: Mapping[str, Tensor]) -> Norm:
    """The norm of queries and keys, side by side [tokens, heads + kv_heads, head_dim], before they are rotated."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.query_key_norm == "none":
        return unchanged
    if config.query_key_norm == "width":
        queries, keys = (make_norm(config, vectors[f"{role}_norm.weight"]) for role in "qk")
        return lambda x: torch.cat((queries(x[:, :heads].flatten(1)), keys(x[:, heads:].flatten(1))), dim=-1).view_as(x)
    weights = []
    for role, count in (("q_norm", heads), ("k_norm", kv_heads)):
        if config.query_key_norm == "listed":
            weights += [vectors[f"{role}.{head}.weight"] for head in range(count)]
        else:
            weight = vectors[f"{role}.weight"]
            weights.append(weight.expand(count, -1) if config.query_key_norm == "head" else weight)
    stacked = torch.stack(weights) if config.query_key_norm == "listed" else torch.cat(weights)
    return HeadNorm(stacked, config.norm_eps, config.norm)


def unchanged(x: Tensor) -> Tensor:
    """Return x."""
    return x


def gated(activation: Activation) -> Callable[[Tensor], Tensor]:
    """``f(gate) * up`` of [tokens, 2 * width], gate and up side by side."""
    return _GATED[activation]


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate) * up


def _geglu_tanh(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


_GATED: dict[Activation, Callable[[Tensor], Tensor]] = {"silu": _swiglu, "gelu": _geglu, "gelu-tanh": _geglu_tanh}
