"""Parts of a layer that hold no large weights: norms and activations."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.kernels.library import Kernels
from rbee_worker.runtime.architecture.config import Activation, ModelConfig, NormKind


class Norm(ABC):
    """Maps [..., width] to the same shape and dtype."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    def of_sum(self, hidden: Tensor, addend: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        """``hidden + multiplier * addend``, and its norm. ``hidden`` may be changed."""
        hidden = torch.add(hidden, addend, alpha=multiplier)
        return hidden, self(hidden)


class RMSNorm(Norm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv:1910.07467)."""

    __slots__ = ("_eps", "_shape", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self._eps = eps
        self._shape = (weight.shape[0],)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self._shape, self.weight, self._eps)


class OffsetRMSNorm(Norm):
    """Gemma's RMS norm: the weights, stored as differences from one, are applied in float32."""

    __slots__ = ("_eps", "_shape", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight.float() + 1
        self._eps = eps
        self._shape = (weight.shape[0],)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self._shape, self.weight, self._eps).to(x.dtype)


class KernelRMSNorm(Norm):
    """An RMS norm of float32 [tokens, width] by the worker's own CPU kernels, which add first where there is a sum."""

    __slots__ = ("_kernels", "eps", "weight")

    def __init__(self, kernels: Kernels, weight: Tensor, eps: float) -> None:
        """``weight``: what the rows are multiplied by."""
        self._kernels = kernels
        self.weight = weight.float()
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, self.weight, self.eps)

    def of_sum(self, hidden: Tensor, addend: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        """See :class:`Norm`."""
        normed = self._kernels.rms_norm(addend, self.weight, self.eps, residual=hidden, multiplier=multiplier)
        return hidden, normed


class LayerNorm(Norm):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension (arXiv:1607.06450)."""

    __slots__ = ("_bias", "_eps", "_shape", "weight")

    def __init__(self, weight: Tensor, eps: float, bias: Tensor | None = None) -> None:
        self.weight, self._bias = weight, bias
        self._eps = eps
        self._shape = (weight.shape[0],)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self._shape, self.weight, self._bias, self._eps)


class HeadNorm(Norm):
    """Norms each head by itself: weights [heads, head_dim], x [tokens, heads, head_dim].

    Attributes:
        weight: what the heads are multiplied by.
        eps: is added to the mean square, or to the variance.
        root_mean_square: whether it is an RMS norm, or else a layer norm.
    """

    __slots__ = ("_shape", "eps", "root_mean_square", "weight")

    def __init__(self, weight: Tensor, eps: float, kind: NormKind) -> None:
        self.root_mean_square = kind != "layer"
        self.weight = weight.float() + 1 if kind == "rms-offset" else weight
        self.eps = eps
        self._shape = (weight.shape[1],)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        if self.root_mean_square:
            normed = functional.rms_norm(wide, self._shape, eps=self.eps)
        else:
            normed = functional.layer_norm(wide, self._shape, eps=self.eps)
        return (normed * self.weight).to(x.dtype)


class WidthNorm(Norm):
    """Norms all heads of queries together, and all of keys: x [tokens, heads + kv_heads, head_dim]."""

    __slots__ = ("_heads", "_keys", "_queries")

    def __init__(self, queries: Norm, keys: Norm, heads: int) -> None:
        self._queries, self._keys, self._heads = queries, keys, heads

    def __call__(self, x: Tensor) -> Tensor:
        queries, keys = x[:, : self._heads].flatten(1), x[:, self._heads :].flatten(1)
        return torch.cat((self._queries(queries), self._keys(keys)), dim=-1).view_as(x)


def make_norm(config: ModelConfig, weight: Tensor, bias: Tensor | None = None, kernels: Kernels | None = None) -> Norm:
    """The kind of norm that the model has; with ``kernels`` by them, if they have it."""
    if config.norm == "layer":
        return LayerNorm(weight, config.norm_eps, bias)
    if kernels is not None:
        return KernelRMSNorm(kernels, weight.float() + 1 if config.norm == "rms-offset" else weight, config.norm_eps)
    return (OffsetRMSNorm if config.norm == "rms-offset" else RMSNorm)(weight, config.norm_eps)


def norm_or_none(
    config: ModelConfig, vectors: Mapping[str, Tensor], role: str, kernels: Kernels | None = None
) -> Norm | None:
    """The norm of a role; None where the model has none there."""
    weight = vectors.get(f"{role}.weight")
    return None if weight is None else make_norm(config, weight, vectors.get(f"{role}.bias"), kernels)


def query_key_norm(config: ModelConfig, vectors: Mapping[str, Tensor]) -> Norm | None:
    """The norm of queries and keys, side by side [tokens, heads + kv_heads, head_dim], before they are rotated."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.query_key_norm == "none":
        return None
    if config.query_key_norm == "width":
        queries, keys = (make_norm(config, vectors[f"{role}_norm.weight"]) for role in "qk")
        return WidthNorm(queries, keys, heads)
    weights = []
    for role, count in (("q_norm", heads), ("k_norm", kv_heads)):
        if config.query_key_norm == "listed":
            weights += [vectors[f"{role}.{head}.weight"] for head in range(count)]
        else:
            weight = vectors[f"{role}.weight"]
            weights.append(weight.expand(count, -1) if config.query_key_norm == "head" else weight)
    stacked = torch.stack(weights) if config.query_key_norm == "listed" else torch.cat(weights)
    return HeadNorm(stacked, config.norm_eps, config.norm)


def gated(activation: Activation, kernels: Kernels | None = None) -> Callable[[Tensor], Tensor]:
    """``f(gate) * up`` of [tokens, 2 * width], gate and up side by side; with ``kernels`` by them."""
    if kernels is None:
        return _GATED[activation]
    return functools.partial(kernels.gated, activation=activation)


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
