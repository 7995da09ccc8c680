"""Linear layers and the forms they run in, chosen in one place: :func:`choose_format`.

``avx2`` and ``avx512`` keep weights as they are stored, or quantize them to blocks of 8 or 4 bits, and multiply with
the worker's own kernels (``rbee_worker/kernels``). They are what an x86 CPU runs where the kernels were built. The
other forms are torch's:

``packed-fp16`` keeps float16 weights in FBGEMM's blocked layout and multiplies in float32. Batch-1 decode then moves
two bytes a weight at the memory's speed, and the error against float64 arithmetic on the same float16 weights stays
below 1e-6; docs/performance.md has the figures that made it the default on CPUs without bfloat16 arithmetic.
``packed-bf16`` keeps bfloat16 weights in oneDNN's blocked layout, for CPUs on which that runs.
``widened`` keeps 16-bit weights as they are, for the other CPUs: they multiply 16 bits slowly, so that for many rows
the weights are made float32, a block at a time.
``dense`` is ``torch.nn.functional.linear``: GPUs, and float32 elsewhere. The int8 forms are in ``int8.py``, and
what the CPU can do is asked in ``cpu.py``.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.config import DTypeName, Quantization
from rbee_worker.errors import ModelUnsupported, Remedy
from rbee_worker.kernels.choice import BLOCK_TYPES
from rbee_worker.kernels.formats import FORMATS, Format
from rbee_worker.kernels.library import Kernels, cpu_kernels, missing_reason
from rbee_worker.kernels.widths import quantized_bytes, quantized_type
from rbee_worker.runtime.model.linear.cpu import cpu_features
from rbee_worker.runtime.model.linear.int8 import LEVELS, Int8Linear, int8_bytes
from rbee_worker.runtime.model.linear.stored import StoredLinear, plain_matrix, quantized_matrix

NOTHING_STORED: Mapping[str, int] = MappingProxyType({})

BLOCK_WEIGHTS = 32 * 2**20
"""A packed matrix is made from blocks of at most this many weights: packing goes through a float32 copy, and
the copy of a whole output head would be the largest allocation of the load."""

WIDEN_ROWS = 12
"""From this many rows on float32 arithmetic, with its conversion, beats 16-bit arithmetic on CPUs that lack the latter:
342 ms to 78 ms for 512 rows of a 5632 x 2048 matrix with AVX2 alone, 6.2 to 6.7 ms for 8 rows."""

_WIDENED_WEIGHTS = 2**20
"""Weights made float32 at a time."""

_TORCH_DTYPES: dict[DTypeName, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

_BITS: dict[Quantization, int] = {"int4": 4, "int8": 8}

_FOUR_BITS = 5.0
"""Bits a weight, scales included, of a stored type that is no wider than int4."""


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """How weights are held and activations flow.

    Attributes:
        kernel: ``avx2``, ``avx512``, ``packed-fp16``, ``packed-bf16``, ``widened``, ``dense``, or one of ``int8.py``.
        weight_dtype: of the stored weights; where they are quantized, of what is not: with torch's int8 forms the
            embedding, with the worker's own kernels matrices whose rows are no whole blocks.
        activation_dtype: of hidden states.
        levels: with int8 kernels, the largest magnitude of a quantized activation.
        quantize: what matrices are quantized to while they are loaded.
        as_stored: matrices of a type that the kernels know stay in it; ``weight_dtype`` is that of the others.
        resident_bytes: of a model that runs as stored: bytes of all its weights.
    """

    kernel: str
    weight_dtype: torch.dtype
    activation_dtype: torch.dtype
    levels: int = LEVELS
    quantize: Quantization = "none"
    as_stored: bool = False
    resident_bytes: int | None = None

    @property
    def dtype_name(self) -> str:
        """``float16``, ``bfloat16`` or ``float32``."""
        return name_of(self.weight_dtype)

    @property
    def packed(self) -> bool:
        """Whether a matrix is made from a copy of the stored one, so that an embedding cannot serve as the head."""
        return not self.native and self.kernel not in ("dense", "widened")

    @property
    def native(self) -> bool:
        """Whether the worker's own kernels multiply."""
        return self.kernel in ("avx2", "avx512")

    def cache_dtype(self, asked: DTypeName) -> torch.dtype:
        """That of keys and values: what was asked for, or what suits the form."""
        if asked != "auto":
            return _TORCH_DTYPES[asked]
        return self.weight_dtype if self.native else self.activation_dtype

    def blocks_of(self, stored: str, columns: int, *, table: bool = False) -> Format | None:
        """The blocks that a matrix is held in; None: it becomes ``weight_dtype``, or an int8 form of torch's.

        Where weights are quantized, a matrix that is stored in blocks no larger than those stays as it is.

        Args:
            stored: its type in the file.
            columns: of the matrix.
            table: it is the embedding or the head.
        """
        if not self.native:
            return None
        found = FORMATS.get(stored)
        kept = found if found is not None and found.in_blocks else None
        if self.quantize == "none" or (self.as_stored and kept is not None):
            return kept if self.as_stored else None
        name = quantized_type(_BITS[self.quantize], columns, table=table)
        if name is None or (kept is not None and kept.bits <= FORMATS[name].bits):
            return kept
        return FORMATS[name]

    def keeps(self, stored: str) -> bool:
        """Whether every matrix of a stored type stays in it, where nothing is quantized."""
        return self.quantize == "none" and self.as_stored and stored in BLOCK_TYPES

    def linear_bytes(self, out_features: int, in_features: int, *, table: bool = False) -> int:
        """Bytes of a matrix [out_features, in_features] at rest, if it is not stored in blocks."""
        if self.native and self.quantize != "none":
            itemsize = self.weight_dtype.itemsize
            return quantized_bytes(_BITS[self.quantize], out_features, in_features, table=table, itemsize=itemsize)
        if self.quantize == "int8":
            return int8_bytes(out_features, in_features, self.kernel)
        return out_features * in_features * self.weight_dtype.itemsize


def name_of(dtype: torch.dtype) -> str:
    """``float16`` and the like."""
    return str(dtype).removeprefix("torch.")


class Linear(Protocol):
    """``y = x W^T + b`` for x of shape [tokens, in_features]."""

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map [tokens, in_features] to [tokens, out_features] in the activation dtype."""
        ...


class DenseLinear:
    """Weights [out_features, in_features] as they are."""

    __slots__ = ("bias", "nbytes", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class WidenedLinear(DenseLinear):
    """16-bit weights as they are; float32 arithmetic where there are many rows."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] < WIDEN_ROWS:
            return super().__call__(x)
        wide = x.float()
        step = max(1, _WIDENED_WEIGHTS // self.weight.shape[1])
        out = torch.cat([functional.linear(wide, block.float()) for block in torch.split(self.weight, step)], dim=-1)
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)


class PackedFp16Linear:
    """float16 weights in FBGEMM's layout, float32 activations and arithmetic."""

    __slots__ = ("_blocks", "nbytes")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        rows = max(1, BLOCK_WEIGHTS // weight.shape[1])
        pack = torch.ops.quantized.linear_prepack_fp16
        float_bias = bias.float() if bias is not None else None
        self._blocks: list[Any] = [
            pack(block.float(), float_bias[i * rows : (i + 1) * rows] if float_bias is not None else None)
            for i, block in enumerate(torch.split(weight, rows))
        ]
        self.nbytes = 2 * weight.numel() + (float_bias.nbytes if float_bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        apply = torch.ops.quantized.linear_dynamic_fp16
        if len(self._blocks) == 1:
            return apply(x, self._blocks[0])  # type: ignore[no-any-return]
        return torch.cat([apply(x, block) for block in self._blocks], dim=-1)


class PackedBf16Linear:
    """bfloat16 weights in oneDNN's layout, bfloat16 activations, float32 accumulation."""

    __slots__ = ("_bias", "_weight", "nbytes")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # noqa: SLF001  (no public name)
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001  (no public name)
        return linear(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]


def choose_format(
    device: torch.device,
    dtype: DTypeName,
    quantize: Quantization = "none",
    stored: Mapping[str, int] = NOTHING_STORED,
    *,
    mapped: bool = False,
) -> LinearFormat:
    """The form for a device, a requested dtype and quantization; ``auto`` takes what is fast and right there.

    Args:
        device: where the weights go.
        dtype: of the weights. With the worker's own kernels ``auto`` leaves them as they are stored.
        quantize: how matrices are quantized as they are loaded. With the worker's own kernels, blocks of a file that
            are no wider than what is asked for stay as they are.
        stored: the bytes of each stored type in the model's files.
        mapped: the files are to be mapped: 16-bit weights are not packed where the worker's own kernels run.

    Raises:
        ModelUnsupported: the device has no kernel for the quantization.
    """
    if quantize == "int4" and not int4_runs(device):
        raise _no_int4(device)
    features = cpu_features()
    variant = features.kernels if device.type == "cpu" else None
    if variant is not None:
        kept = _kept(stored, dtype, quantize)
        if dtype == "auto":
            dtype = "bfloat16" if stored.get("BF16", 0) > stored.get("F16", 0) else "float16"
        packed = features.bf16_arithmetic and not features.bf16_kernels and not mapped  # faster than the kernels
        wide = dtype == "float32" or (dtype == "bfloat16" and packed)
        if kept or quantize != "none" or not wide:
            return LinearFormat(variant, _TORCH_DTYPES[dtype], torch.float32, quantize=quantize, as_stored=kept)
    elif dtype == "auto":
        # In int8, only the embedding is held in it: float16 rounds it eight times finer than bfloat16.
        dtype = "float16" if quantize == "int8" and device.type == "cpu" else _auto_dtype(device)
    weights = _TORCH_DTYPES[dtype]
    return _int8_format(device, weights) if quantize == "int8" else _torch_format(device, weights)


def _kept(stored: Mapping[str, int], dtype: DTypeName, quantize: Quantization) -> bool:
    """Whether a model runs in the blocks that it is stored in, with the worker's own kernels."""
    if quantize == "int4":
        # Of a file like Q4_K_M, which is finer in places, nothing becomes coarser.
        narrow = (size for name, size in stored.items() if name in FORMATS and FORMATS[name].bits <= _FOUR_BITS)
        return 2 * sum(narrow) > sum(stored.values())
    return (
        quantize == "none" and dtype == "auto" and any(name in FORMATS and FORMATS[name].in_blocks for name in stored)
    )


def _torch_format(device: torch.device, weights: torch.dtype) -> LinearFormat:
    if device.type == "cpu" and weights != torch.float32:
        features = cpu_features()
        if weights == torch.float16 and features.packed_fp16:
            return LinearFormat("packed-fp16", weights, torch.float32)
        if weights == torch.bfloat16 and features.packed_bf16:
            return LinearFormat("packed-bf16", weights, weights)
        return LinearFormat("widened", weights, weights)
    return LinearFormat("dense", weights, weights)


def int4_runs(device: torch.device) -> bool:
    """Whether weights of 4 bits run on a device."""
    return device.type == "cpu" and cpu_features().kernels is not None


def kernels_of(form: LinearFormat) -> Kernels | None:
    """The worker's own kernels, if a model in this form runs on them."""
    return cpu_kernels() if form.native else None


def make_linear(weight: Tensor, bias: Tensor | None, form: LinearFormat) -> Linear:
    """A linear layer in the given form from weights [out_features, in_features] on their device."""
    if form.kernel == "packed-fp16":
        return PackedFp16Linear(weight, bias)
    if form.quantize == "int8" and not form.native:
        return Int8Linear(weight, bias, form.kernel, form.levels)
    kernels = kernels_of(form)
    if kernels is not None and (blocks := form.blocks_of("", weight.shape[1])) is not None:
        return StoredLinear(kernels, [quantized_matrix(weight.float(), blocks)], bias)
    weight = weight.to(form.weight_dtype)
    if kernels is not None:
        return StoredLinear(kernels, [plain_matrix(weight)], bias)
    bias = bias.to(form.weight_dtype) if bias is not None else None
    return _SIMPLE_FORMS[form.kernel](weight, bias)


_SIMPLE_FORMS: dict[str, type[DenseLinear | PackedBf16Linear]] = {
    "dense": DenseLinear,
    "widened": WidenedLinear,
    "packed-bf16": PackedBf16Linear,
}
"""Forms that are made from weights and bias in the weights' dtype."""


def _int8_format(device: torch.device, embedding: torch.dtype) -> LinearFormat:
    if device.type == "cuda":
        return LinearFormat("int8", embedding, embedding, quantize="int8")
    if device.type == "cpu":
        levels = cpu_features().int8_levels
        kernel = "packed-int8" if levels else "plain-int8"
        return LinearFormat(kernel, embedding, torch.float32, levels or LEVELS, "int8")
    raise ModelUnsupported(
        f"quantize int8 does not run on {device.type}.",
        remedies=[Remedy({"quantize": "none"}), Remedy({"device": "cpu"})],
    )


def _no_int4(device: torch.device) -> ModelUnsupported:
    """Only the worker's own kernels multiply by it."""
    here, reason = device.type == "cpu", missing_reason()
    ways = [Remedy({"quantize": "int8"})] if device.type in ("cpu", "cuda") else []
    ways += [Remedy({"quantize": "none"})]
    if not here and reason is None:
        ways += [Remedy({"device": "cpu"})]
    return ModelUnsupported(
        f"quantize int4 needs the worker's own CPU kernels. {reason}"
        if here and reason
        else f"quantize int4 does not run on {device.type}: it needs the worker's own CPU kernels.",
        hint="Without RBEE_KERNELS they are on." if here and os.environ.get("RBEE_KERNELS") == "torch" else None,
        remedies=ways,
    )


def _auto_dtype(device: torch.device) -> DTypeName:
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "mps":
        return "float16"
    features = cpu_features()
    if features.bf16_arithmetic and features.packed_bf16:
        return "bfloat16"
    return "float16" if features.packed_fp16 else "float32"
