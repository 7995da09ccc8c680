"""The C++ library: which variant this CPU runs, and its functions on tensors.

A variant is the same C++ compiled for other instructions: ``avx2`` (with FMA and F16C) or ``avx512`` (with VNNI). Each
is a file of its own, and one is loaded. ``RBEE_KERNELS`` says which: ``auto`` takes the best that this CPU runs,
``avx2`` and ``avx512`` force one, and ``torch`` is none. Without it, it is ``auto``.
"""

import ctypes
import functools
import importlib.util
import os
import weakref
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rbee_worker.cgroup import cpu_limit
from rbee_worker.errors import DeviceUnavailable
from rbee_worker.kernels.arguments import (
    ACTIVATIONS,
    Attention,
    GatedActivation,
    Norm,
    RotaryTables,
    Rotation,
    Segments,
    StoredWeights,
    check,
)
from rbee_worker.kernels.formats import FLOAT_FORMATS
from rbee_worker.kernels.layer import KernelLayer, StepTokens

ABI_VERSION = 4
"""Of ``cpp/abi.h``."""

Variant = Literal["avx2", "avx512"]

_NEEDED: dict[Variant, tuple[str, ...]] = {
    "avx512": ("avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni"),
    "avx2": ("avx2", "fma3", "f16c"),
}
"""What a CPU must have, by torch's names. The best variant comes first."""

_NO_MEMORY = 1


class Kernels:
    """A loaded variant with its threads. Any thread may call; calls wait for each other.

    Attributes:
        variant: which.
        threads: how many work at one call, the caller's included.
    """

    def __init__(self, variant: Variant, threads: int) -> None:
        """Load the library and start its threads.

        Raises:
            OSError: the file is not there, cannot be loaded, or is of another version.
            MemoryError: there is no memory, or no thread to be had.
            ValueError: ``threads`` is below 1.
        """
        if threads < 1:
            raise ValueError(f"{threads} threads for the kernels: at least 1 is needed")
        self.variant, self.threads = variant, threads
        library = ctypes.CDLL(_path(variant))
        if (found := library.rbee_abi_version()) != ABI_VERSION:
            raise OSError(f"the kernels are of version {found}, not {ABI_VERSION}: build them again")
        library.rbee_create.restype = ctypes.c_void_p
        library.rbee_destroy.argtypes = [ctypes.c_void_p]
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._linear, self._rows = library.rbee_linear, library.rbee_rows
        self._linear.argtypes = [pointer, pointer, ctypes.c_int32, pointer, size, pointer, pointer]
        self._rows.argtypes = [pointer, pointer, pointer, size, pointer]
        self._context = library.rbee_create(threads)
        if not self._context:
            raise MemoryError(f"{threads} threads for the kernels")
        # Not when the process ends, which ends its threads too.
        weakref.finalize(self, _destroy, library.rbee_destroy, self._context, os.getpid()).atexit = False
        self._attention = library.rbee_attention
        self._attention.argtypes = [pointer, pointer]
        self._rms_norm, self._rotate = library.rbee_rms_norm, library.rbee_rotate_and_store
        self._rms_norm.argtypes = self._rotate.argtypes = [pointer, pointer]
        self._gated = library.rbee_gated
        self._gated.argtypes = [pointer, ctypes.c_int32, pointer, size, size, pointer]
        self._layer = library.rbee_layer
        self._layer.argtypes = [pointer, pointer, pointer, pointer, pointer, ctypes.c_int32, pointer]

    def linear(self, x: Tensor, weights: StoredWeights, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b``. A token's result has the same bits alone and beside any others.

        Args:
            x: float32 [tokens, inputs], on the CPU.
            weights: W, outputs first.
            bias: float32 [outputs], contiguous, on the CPU.

        Returns:
            float32 [tokens, outputs].

        Raises:
            MemoryError: there is none for the call's intermediate values.
            ValueError: a tensor is not as it should be.
        """
        x = x.contiguous()
        check("x", x, torch.float32, (*x.shape[:1], weights.inputs))
        if bias is not None:
            check("bias", bias, torch.float32, (weights.outputs,))
        tokens = x.shape[0]
        y = x.new_empty(tokens, weights.outputs)
        address = None if bias is None else bias.data_ptr()
        status = self._linear(
            self._context, weights.address, weights.count, x.data_ptr(), tokens, address, y.data_ptr()
        )
        if status:
            raise MemoryError("for a linear layer") if status == _NO_MEMORY else ValueError("an unknown weight format")
        return y

    def rows(self, weights: StoredWeights, rows: Tensor) -> Tensor:
        """Rows of one stored matrix as numbers.

        Args:
            weights: of one matrix.
            rows: int64 [count], contiguous, on the CPU; each below ``weights.outputs``.

        Returns:
            float32 [count, inputs].

        Raises:
            ValueError: ``rows`` is not as it should be, or the weights are of several matrices.
        """
        if weights.count != 1:
            raise ValueError(f"rows are of one matrix, not of {weights.count}")
        check("rows", rows, torch.int64, (rows.numel(),))
        if rows.numel():
            first, last = rows.aminmax()
            if first < 0 or last >= weights.outputs:
                raise ValueError(f"rows {int(first)} to {int(last)} of a matrix of {weights.outputs} rows")
        y = torch.empty(rows.shape[0], weights.inputs)
        if self._rows(self._context, weights.address, rows.data_ptr(), rows.shape[0], y.data_ptr()):
            raise ValueError("an unknown weight format")
        return y

    def attention(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        segments: Segments,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal grouped-query attention of new tokens over their sequences' positions in the pool.

        A token's result has the same bits wherever its sequence's runs lie, however the sequence was cut into steps,
        and beside any others. :func:`attends` says for which shapes it is.

        Args:
            queries: float32 [tokens, heads, head_dim]; a slice of wider rows will do.
            keys: of one layer, float32, float16 or bfloat16 [kv_heads, positions, head_dim], the new tokens' included.
            values: as keys.
            segments: whose tokens they are; all tokens are somebody's.
            scale: of the products of queries and keys.
            window: a query sees this many positions, its own included; None: all before it.
            softcap: scores become ``cap * tanh(score / cap)``.
            sinks: float32 [heads], one more score for each head, which has no value.

        Returns:
            float32 [tokens, heads * head_dim].

        Raises:
            MemoryError: there is none for the call's intermediate values.
            ValueError: a tensor is not as it should be.
        """
        tokens, heads, head_dim = queries.shape
        kv_heads, layout, cached = keys.shape[0], keys.stride(), FLOAT_FORMATS.get(keys.dtype)
        stride, head, one = queries.stride()
        if sinks is not None:
            check("sinks", sinks, torch.float32, (heads,))
        if cached is None or head_dim % 8 or heads % kv_heads or queries.dtype != torch.float32 or not queries.is_cpu:
            wanted = f"{queries.dtype} {list(queries.shape)} to {keys.dtype} {list(keys.shape)}"
            raise ValueError(f"no attention of {wanted}")
        if head != head_dim or one != 1 or layout != values.stride() or values.dtype != keys.dtype:
            raise ValueError("queries must be contiguous in each token, and values be laid out as keys")
        if layout[1] != head_dim or layout[2] != 1 or segments.tokens != tokens or keys.shape != values.shape:
            raise ValueError("keys must be contiguous in each head, values be as many, and each token be of a segment")
        out = queries.new_empty(tokens, heads * head_dim)
        described, runs = segments.addresses
        arguments = Attention(
            queries.data_ptr(),
            stride,
            heads,
            kv_heads,
            head_dim,
            keys.data_ptr(),
            values.data_ptr(),
            layout[0],
            cached.number,
            described,
            segments.count,
            runs,
            window or 0,
            scale,
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
        )
        if self._attention(self._context, ctypes.addressof(arguments)):
            raise MemoryError("for attention")
        return out

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        residual: Tensor | None = None,
        multiplier: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

        Args:
            x: float32 [tokens, width], or [tokens, heads, width] where each head has weights of its own. A slice of
                wider rows will do.
            weight: float32, as x without its tokens, contiguous. Of Gemma's norm, one more than what is stored.
            eps: is added to the mean.
            residual: as x: becomes ``residual + multiplier * x``, and this is what is normed.
            multiplier: of x; there must be a residual.
            out: as x, takes the result; it may be x. None: a new tensor.

        Returns:
            float32, as x.

        Raises:
            ValueError: a tensor is not as it should be.
        """
        shape, stride, inner = x.shape, x.stride(), weight.stride()
        y = torch.empty_like(x) if out is None else out
        if x.dtype != torch.float32 or weight.dtype != torch.float32 or shape[1:] != weight.shape or not x.is_cpu:
            raise ValueError(f"an RMS norm of {x.dtype} {list(shape)} by {weight.dtype} {list(weight.shape)}")
        if stride[1:] != inner or not weight.is_contiguous():
            raise ValueError("weights must be contiguous, and so must each token")
        before = x if residual is None else residual
        for other in (residual, out):
            if other is not None and (other.dtype != x.dtype or other.shape != shape or other.stride()[1:] != inner):
                raise ValueError(f"an RMS norm of {list(shape)} with {other.dtype} {list(other.shape)}")
        width = shape[-1]
        arguments = Norm(
            x.data_ptr(),
            stride[0],
            None if residual is None else residual.data_ptr(),
            before.stride(0),
            weight.data_ptr(),
            y.data_ptr(),
            y.stride(0),
            shape[0],
            weight.numel() // width,
            width,
            multiplier,
            eps,
        )
        self._rms_norm(self._context, ctypes.addressof(arguments))
        return y

    def rotate_and_store(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        *,
        tables: RotaryTables | None,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Norm and rotate queries and keys in place, and write keys and values to the cache, rounded half to even.

        Args:
            qkv: float32 [tokens, heads + 2 * kv_heads, head_dim]; a slice of wider rows will do.
            keys: of one layer, float32, float16 or bfloat16 [kv_heads, positions, head_dim].
            values: as keys.
            slots: positions in them that take the tokens', int64 [tokens]; they are not checked.
            tables: of the rotation, whose rows are not checked; None: there is none.
            norm: float32 [heads + kv_heads, head_dim]: weights of an RMS norm of each head, before the rotation.
            eps: of this norm.

        Returns:
            The queries, [tokens, heads, head_dim]: a part of ``qkv``.

        Raises:
            ValueError: a tensor is not as it should be.
        """
        tokens, total, head_dim = qkv.shape
        kv_heads = keys.shape[0]
        heads = total - 2 * kv_heads
        if qkv.dtype != torch.float32 or keys.dtype != values.dtype or keys.dtype not in FLOAT_FORMATS or heads < 0:
            raise ValueError(f"no rotation of {qkv.dtype} {list(qkv.shape)} to {keys.dtype} {list(keys.shape)}")
        if not (qkv.stride()[1:] == keys.stride()[1:] == (head_dim, 1) and keys.stride() == values.stride()) or (
            keys.shape != values.shape
        ):
            raise ValueError("tokens and the cache's heads must be contiguous, and values laid out as keys")
        check("slots", slots, torch.int64, (tokens,))
        if norm is not None:
            check("norm", norm, torch.float32, (heads + kv_heads, head_dim))
        rotary_dim = 0
        if tables is not None:
            rotary_dim = tables.cos.shape[1]
            if rotary_dim > head_dim or tables.rows.shape[0] != tokens:
                raise ValueError(
                    f"{rotary_dim} dimensions of {head_dim}, {tables.rows.shape[0]} rows for {tokens} tokens"
                )
        arguments = Rotation(
            qkv.data_ptr(),
            qkv.stride(0),
            tokens,
            heads,
            kv_heads,
            head_dim,
            None if norm is None else norm.data_ptr(),
            None if tables is None else tables.cos.data_ptr(),
            None if tables is None else tables.sin.data_ptr(),
            None if tables is None else tables.rows.data_ptr(),
            rotary_dim,
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
            slots.data_ptr(),
            FLOAT_FORMATS[keys.dtype].number,
            tables is not None and tables.interleaved,
            eps,
            0,
        )
        self._rotate(self._context, ctypes.addressof(arguments))
        return qkv[:, :heads]

    def gated(self, gate_up: Tensor, activation: GatedActivation) -> Tensor:
        """``f(gate) * up``.

        Args:
            gate_up: float32 [tokens, 2 * width], gate and up side by side, contiguous.
            activation: f; ``gelu-tanh`` is the approximation of gelu by a tanh.

        Returns:
            float32 [tokens, width].

        Raises:
            ValueError: a tensor is not as it should be.
        """
        tokens, both = gate_up.shape
        if gate_up.dtype != torch.float32 or both % 2 or not gate_up.is_contiguous():
            raise ValueError(f"gate and up are {gate_up.dtype} {list(gate_up.shape)}; contiguous float32 is needed")
        y = gate_up.new_empty(tokens, both // 2)
        self._gated(self._context, ACTIVATIONS[activation], gate_up.data_ptr(), tokens, both // 2, y.data_ptr())
        return y

    def layer(
        self, layer: KernelLayer, tokens: StepTokens, hidden: Tensor, addend: Tensor, between: Tensor, *, pending: bool
    ) -> None:
        """Run a whole decoder layer. The bits are those of its operators, one by one.

        Args:
            layer: what it is made of.
            tokens: of the step.
            hidden: the residual stream, float32 [tokens, hidden_size], contiguous, on the CPU. It is changed.
            addend: as hidden. What the layer gives, not yet added; before, if ``pending``, what the layer before gave.
            between: float32, at least ``layer.floats`` for each token, contiguous, on the CPU. It is overwritten.
            pending: whether the addend is to be added first.

        Raises:
            MemoryError: there is none for the call's intermediate values.
            ValueError: a tensor is not as it should be.
        """
        shape = (tokens.count, layer.hidden_size)
        check("hidden", hidden, torch.float32, shape)
        check("addend", addend, torch.float32, shape)
        check("between", between, torch.float32, (max(between.numel(), tokens.count * layer.floats),))
        status = self._layer(
            self._context,
            layer.address,
            tokens.address,
            hidden.data_ptr(),
            addend.data_ptr(),
            pending,
            between.data_ptr(),
        )
        if status:
            raise MemoryError("for a layer") if status == _NO_MEMORY else ValueError("an unknown weight format")


def attends(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether :meth:`Kernels.attention` takes heads of this size, cached in this dtype."""
    return head_dim % 8 == 0 and dtype in FLOAT_FORMATS


def cpu_kernels() -> Kernels | None:
    """The kernels of this process; None where it computes with torch alone. Why, says :func:`missing_reason`."""
    choice = _choose()
    return choice if isinstance(choice, Kernels) else None


def missing_reason() -> str | None:
    """Why there are no kernels, for people; None where there are."""
    choice = _choose()
    return None if isinstance(choice, Kernels) else choice


def supported(variant: Variant) -> bool:
    """Whether this CPU has the instructions of a variant, and ``ATEN_CPU_CAPABILITY`` does not hide them from torch."""
    if variant == "avx512" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return all(capabilities.get(name, False) for name in _NEEDED[variant])


def built(variant: Variant) -> bool:
    """Whether the file of a variant was built with this installation."""
    return importlib.util.find_spec(_module(variant)) is not None


@functools.cache
def _choose() -> Kernels | str:
    """The kernels, or why there are none.

    Raises:
        DeviceUnavailable: a variant is forced that this CPU or this installation lacks.
    """
    asked = os.environ.get("RBEE_KERNELS") or "auto"
    if asked == "torch":
        return "RBEE_KERNELS is torch."
    known: list[Variant] = list(_NEEDED)
    if asked not in ("auto", *known):
        raise DeviceUnavailable(f"RBEE_KERNELS is {asked!r}; it may be auto, torch, {', '.join(sorted(known))}.")
    wanted: list[Variant] = [variant for variant in known if asked in ("auto", variant)]
    usable = [variant for variant in wanted if supported(variant)]
    if not usable:
        reason = f"This CPU lacks {' and '.join(sorted(wanted))}."
    elif not any(map(built, usable)):
        reason = "They were not built: no C++ compiler was found when the worker was installed."
    else:
        variant = next(filter(built, usable))
        try:
            return Kernels(variant, _threads())
        except (OSError, MemoryError) as error:
            reason = f"Their library does not load: {error}."
    if asked != "auto":
        raise DeviceUnavailable(f"RBEE_KERNELS is {asked!r}. {reason}")
    return reason


def _destroy(destroy: Callable[[int], object], context: int, process: int) -> None:
    if os.getpid() == process:  # a forked child has no such threads to wait for
        destroy(context)


def _threads() -> int:
    """As many as torch uses, on the cores that this process may use, within a container's quota of their time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else torch.get_num_threads()
    return max(1, min(torch.get_num_threads(), cores, cpu_limit() or cores))


def _module(variant: Variant) -> str:
    return f"{__package__}.cpp._{variant}"  # no package: what walks through the modules finds no file to import


def _path(variant: Variant) -> str:
    spec = importlib.util.find_spec(_module(variant))
    if spec is None or spec.origin is None:
        raise OSError(f"the kernels for {variant} were not built")
    return spec.origin
