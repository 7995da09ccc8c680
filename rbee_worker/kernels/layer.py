"""A decoder layer that the library runs in one call: what it is made of, checked once, and a step's tokens."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from rbee_worker.kernels.arguments import (
    ACTIVATIONS,
    Attention,
    GatedActivation,
    RotaryTables,
    Rotation,
    Segments,
    StoredWeights,
    check,
)
from rbee_worker.kernels.formats import FLOAT_FORMATS


class _Linear(ctypes.Structure):
    """``Linear`` of ``cpp/abi.h``."""

    _fields_ = (("matrices", ctypes.c_void_p), ("count", ctypes.c_int64), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    """``Layer`` of ``cpp/abi.h``."""

    _fields_ = (
        ("hidden_size", ctypes.c_int64),
        ("qkv", _Linear),
        ("o", _Linear),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("attention_norm", ctypes.c_void_p),
        ("attention_post_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("mlp_post_norm", ctypes.c_void_p),
        ("multiplier", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("activation", ctypes.c_int64),
        ("rotation", Rotation),
        ("attention", Attention),
    )


class _Tokens(ctypes.Structure):
    """``Tokens`` of ``cpp/abi.h``."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("segments", ctypes.c_void_p),
        ("segment_count", ctypes.c_int64),
        ("runs", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class LinearPart:
    """A linear layer: weights, and a bias, float32 [outputs], or None."""

    weights: StoredWeights
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class NormParts:
    """Weights of RMS norms, float32 [hidden_size], before attention and MLP and, where there are some, after them.

    ``eps`` is added to the mean squares of all of them.
    """

    attention: Tensor
    mlp: Tensor
    attention_post: Tensor | None
    mlp_post: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionParts:
    """What :meth:`Kernels.rotate_and_store` and :meth:`Kernels.attention` take, the same in every step.

    Attributes:
        heads: of queries, each of ``head_dim``.
        keys: of the layer, float32, float16 or bfloat16 [kv_heads, positions, head_dim]; ``values``: as keys.
        tables: of the rotation, whose rows are not used; None: there is none.
        norm: float32 [heads + kv_heads, head_dim], of each head before the rotation, or None.
        norm_eps: of this norm.
        scale, window, softcap, sinks: see :meth:`Kernels.attention`.
    """

    heads: int
    head_dim: int
    keys: Tensor
    values: Tensor
    tables: RotaryTables | None
    norm: Tensor | None
    norm_eps: float
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class KernelLayer:
    """Norm, attention, norm and gated MLP, with the residual stream around them. It keeps its tensors alive.

    Attributes:
        hidden_size: numbers of a token in the residual stream.
        floats: of memory between the operators, for each token.
        address: of ``Layer`` in ``cpp/abi.h``.
    """

    __slots__ = ("_described", "_parts", "address", "floats", "hidden_size")

    def __init__(
        self,
        qkv: LinearPart,
        o: LinearPart,
        gate_up: LinearPart,
        down: LinearPart,
        *,
        norms: NormParts,
        attention: AttentionParts,
        activation: GatedActivation,
        multiplier: float,
    ) -> None:
        """Check the parts and describe them for the library. ``multiplier``: of all that is added to the stream.

        Raises:
            ValueError: parts do not fit each other, or a tensor is not as it should be.
        """
        self.hidden_size = hidden = qkv.weights.inputs
        attended = attention.heads * attention.head_dim
        kv_heads, both = attention.keys.shape[0], gate_up.weights.outputs
        for part, inputs, outputs in (
            (qkv, hidden, attended + 2 * kv_heads * attention.head_dim),
            (o, attended, hidden),
            (gate_up, hidden, both // 2 * 2),
            (down, both // 2, hidden),
        ):
            if (part.weights.inputs, part.weights.outputs) != (inputs, outputs):
                raise ValueError(f"{part.weights.inputs} to {part.weights.outputs} where {inputs} to {outputs} fit")
            if part.bias is not None:
                check("bias", part.bias, torch.float32, (outputs,))
        for norm in (norms.attention, norms.mlp, norms.attention_post, norms.mlp_post):
            if norm is not None:
                check("norm", norm, torch.float32, (hidden,))
        self._parts = (qkv, o, gate_up, down, norms, attention)
        self._described = _Layer(
            hidden,
            *(_Linear(part.weights.address, part.weights.count, address(part.bias)) for part in self._parts[:4]),
            address(norms.attention),
            address(norms.attention_post),
            address(norms.mlp),
            address(norms.mlp_post),
            multiplier,
            norms.eps,
            ACTIVATIONS[activation],
            _rotation(attention),
            _attention(attention),
        )
        self.floats = hidden + max(qkv.weights.outputs + attended, both + both // 2)
        self.address = ctypes.addressof(self._described)


class StepTokens:
    """One step's tokens, for all layers.

    Attributes:
        count: how many; ``address``: of ``Tokens`` in ``cpp/abi.h``.
    """

    __slots__ = ("_described", "_parts", "address", "count")

    def __init__(self, segments: Segments, rows: Tensor, slots: Tensor) -> None:
        """Describe them.

        Args:
            segments: whose they are.
            rows: of the rotary tables, int64 [tokens]; they are not checked.
            slots: positions in the cache that take their keys and values, int64 [tokens]; they are not checked.

        Raises:
            ValueError: a tensor is not as it should be.
        """
        self.count = segments.tokens
        check("rows", rows, torch.int64, (self.count,))
        check("slots", slots, torch.int64, (self.count,))
        self._parts = (segments, rows, slots)
        described, runs = segments.addresses
        self._described = _Tokens(self.count, rows.data_ptr(), slots.data_ptr(), described, segments.count, runs)
        self.address = ctypes.addressof(self._described)


def address(tensor: Tensor | None) -> int | None:
    """Of its memory; None of None."""
    return None if tensor is None else tensor.data_ptr()


def _rotation(parts: AttentionParts) -> Rotation:
    keys, values, tables, size = parts.keys, parts.values, parts.tables, parts.head_dim
    kv_heads = keys.shape[0]
    if keys.dtype not in FLOAT_FORMATS or size % 8 or parts.heads % kv_heads or keys.shape[2] != size:
        raise ValueError(f"no attention of {parts.heads} heads of {size} to {keys.dtype} {list(keys.shape)}")
    if keys.stride()[1:] != (size, 1) or not keys.is_cpu:
        raise ValueError("keys must be contiguous in each head, and on cpu")
    if (keys.stride(), keys.shape, keys.dtype) != (values.stride(), values.shape, values.dtype):
        raise ValueError("values must be laid out as keys")
    if parts.norm is not None:
        check("norm", parts.norm, torch.float32, (parts.heads + kv_heads, size))
    if tables is not None and tables.cos.shape[1] > size:
        raise ValueError(f"{tables.cos.shape[1]} dimensions of {size}")
    return Rotation(
        heads=parts.heads,
        kv_heads=kv_heads,
        head_dim=size,
        norm=address(parts.norm),
        cos=None if tables is None else tables.cos.data_ptr(),
        sin=None if tables is None else tables.sin.data_ptr(),
        rotary_dim=0 if tables is None else tables.cos.shape[1],
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        head_stride=keys.stride(0),
        format=FLOAT_FORMATS[keys.dtype].number,
        interleaved=tables is not None and tables.interleaved,
        eps=parts.norm_eps,
    )


def _attention(parts: AttentionParts) -> Attention:
    if parts.sinks is not None:
        check("sinks", parts.sinks, torch.float32, (parts.heads,))
    return Attention(
        heads=parts.heads,
        kv_heads=parts.keys.shape[0],
        head_dim=parts.head_dim,
        keys=parts.keys.data_ptr(),
        values=parts.values.data_ptr(),
        head_stride=parts.keys.stride(0),
        format=FLOAT_FORMATS[parts.keys.dtype].number,
        window=parts.window or 0,
        scale=parts.scale,
        softcap=parts.softcap or 0.0,
        sinks=address(parts.sinks),
    )
