"""Quantized tensors presented as plain ones: a module's stored parts become one ``weight``.

A quantized checkpoint holds several tensors for each matrix: packed values, scales, zero points. This module replaces
them by one tensor with the name and shape that the model expects, and checks them against each other. It needs only
the headers. ``dequantize.py`` computes the values while they are read.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol

from rbee_worker.errors import ModelMalformed
from rbee_worker.escape import quoted
from rbee_worker.runtime.files import open_file
from rbee_worker.runtime.formats.checkpoint import Checkpoint, TensorInfo

WORD_BITS = 32
_MAX_BIAS_BYTES = 2**24
FLOATS = ("F32", "F16", "BF16")
"""Dtypes that scales are stored in."""

Packing = Literal["plain", "rows", "columns", "awq"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """``(value - zero) * scale / divisor``, with one scale for each block of weights.

    Parts are ``weight`` and ``scale``; where there are zero points, ``zero``; where each input's group is stored,
    ``order``; where the file repeats the shape, ``shape``.

    Attributes:
        what: the name of the format, for people.
        packing: ``plain``: [outputs, inputs], not packed. ``rows``: int32 [outputs, inputs * bits / 32], neighboring
            inputs in a word, the lowest bits first. ``columns``: the same, int32 [inputs * bits / 32, outputs].
            ``awq``: int32 [inputs, outputs / 8], the outputs of a word in AWQ's order.
        bits: of a value.
        centre: subtracted from stored values, and from zero points where ``zeros`` is ``columns``.
        zeros: how zero points are stored, where there are any. ``plain``: as the scales. ``rows``: [groups, outputs],
            packed along the outputs (GPTQ); ``awq``: the same in AWQ's order. ``columns``: [outputs, groups], packed
            along the outputs (compressed-tensors).
        zero_offset: added to a stored zero point, modulo 2**bits: 1 in GPTQ's first version.
        block: how many outputs and inputs share a scale.
        transposed: whether scales are stored as [groups, outputs] instead of [outputs, groups].
        divisor: the stored scales are divided by it.
    """

    what: str
    packing: Packing
    bits: int = 8
    centre: int = 0
    zeros: Packing = "plain"
    zero_offset: int = 0
    block: tuple[int, int]
    transposed: bool = False
    divisor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook:
    """``map[value] * absmax``: values of 4 bits, the first in the upper half of a byte, in blocks along the rows.

    Parts are ``weight``, ``absmax`` and ``map``. Where absmax is quantized too, ``nested_absmax`` and ``nested_map``
    are added: ``absmax = nested_map[value] * nested_absmax + nested_offset``.

    Attributes:
        what: the name of the format, for people.
        block: values that share an absmax.
        nested_block: values of absmax that share a nested_absmax; 0: absmax is not quantized.
        nested_offset: see above.
    """

    what: str
    block: int
    nested_block: int = 0
    nested_offset: float = 0.0


Scheme = Grouped | Codebook


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor(TensorInfo):
    """A matrix that is stored in parts.

    ``dtype``, ``file`` and ``offset`` are those of the packed values; ``nbytes`` counts all parts.

    Attributes:
        scheme: how the values are computed.
        parts: the stored tensors by their role in the scheme.
        outputs: rows of the whole matrix. ``shape`` has fewer where this tensor is a range of rows.
        first: the first row of the range.
    """

    scheme: Scheme
    parts: Mapping[str, TensorInfo] = field(hash=False)
    outputs: int
    first: int = 0

    def rows(self, begin: int, end: int) -> "QuantizedTensor":
        """Rows ``begin`` to ``end`` of this tensor, ``end`` not included, as a tensor of their own."""
        nbytes = self.nbytes * (end - begin) // self.shape[0]
        return replace(self, shape=(end - begin, self.shape[1]), nbytes=nbytes, first=self.first + begin)


def files_of(info: TensorInfo) -> Iterable[Path]:
    """The files that hold a tensor or its parts."""
    return (part.file for part in info.parts.values()) if isinstance(info, QuantizedTensor) else (info.file,)


def is_idle_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is the bias of a quantized module and all its bytes are zero. AutoGPTQ gives every module one.

    Raises:
        ModelMalformed: the bias cannot be read, or is too large.
    """
    info = checkpoint.tensors[name]
    module, _, part = name.rpartition(".")
    if part != "bias" or not isinstance(checkpoint.tensors.get(f"{module}.weight"), QuantizedTensor):
        return False
    return not any(read_now(info, limit=_MAX_BIAS_BYTES))


def read_now(info: TensorInfo, *, limit: int) -> bytes:
    """The bytes of a small tensor.

    Raises:
        ModelMalformed: it has more than ``limit`` bytes, or cannot be read.
    """
    where = f"{info.file.name}: tensor {quoted(info.name)}"
    if info.nbytes > limit:
        raise ModelMalformed(f"{where} is {info.nbytes} bytes, too many for what it should hold.")
    try:
        with open_file(info.file) as stream:
            stream.seek(info.offset)
            return stream.read(info.nbytes)
    except OSError as error:
        raise ModelMalformed(f"{info.file}: cannot be read: {error.strerror or error}.") from error


class Format(Protocol):
    """A quantization method with its options, as ``config.json`` gives them."""

    def present(self, stored: "Stored") -> None:
        """Replace the parts of every quantized module by its weight.

        Raises:
            ModelMalformed: a part is missing, or of another shape or dtype than the others imply.
            ModelUnsupported: a layout that is not read.
        """


class Stored:
    """The tensors of a checkpoint, while a format replaces the parts of quantized matrices.

    ``ignored`` lists the modules that are not quantized, as :func:`names` takes them.
    """

    def __init__(self, checkpoint: Checkpoint, ignored: Sequence[str] = ()) -> None:
        self._tensors = dict(checkpoint.tensors)
        self._files = checkpoint.files
        self._ignored = ignored

    def modules(self, part: str, dtypes: Sequence[str] | None = None) -> list[str]:
        """Names of the modules that have a part of this name, and of one of ``dtypes`` where they are given.

        Raises:
            ModelMalformed: the config says that one of the modules is not quantized.
        """
        found = [
            name.removesuffix(f".{part}")
            for name, info in self._tensors.items()
            if name.endswith(f".{part}") and (dtypes is None or info.dtype in dtypes)
        ]
        for module in found:
            if any(names(pattern, module) for pattern in self._ignored):
                raise ModelMalformed(
                    f"{self._tensors[f'{module}.{part}'].file.name}: tensor {quoted(f'{module}.{part}')} is quantized, "
                    "though config.json lists its module among those that are not."
                )
        return found

    def has(self, module: str, part: str) -> bool:
        """Whether a module has a part of this name."""
        return f"{module}.{part}" in self._tensors

    def take(
        self,
        module: str,
        part: str,
        dtypes: Sequence[str] | None,
        *shapes: tuple[int, ...],
        check: Callable[[tuple[int, ...]], bool] | None = None,
    ) -> TensorInfo:
        """Remove a part and return it.

        Args:
            module: the name of its module.
            part: its name inside the module.
            dtypes: the dtypes that it may have; None: any.
            shapes: the shapes that it may have; none: any.
            check: whether a shape is allowed.

        Raises:
            ModelMalformed: the part is missing, or has another dtype or shape.
        """
        name = f"{module}.{part}"
        info = self._tensors.get(name)
        if info is None:
            raise ModelMalformed(
                f"{self._where()}: tensor {quoted(name)} is missing, a part of the quantized {quoted(module)}.",
                hint="Is the checkpoint complete, and config.json its own?",
            )
        if dtypes is not None and info.dtype not in dtypes:
            raise self.malformed(info, f"is {info.dtype}; this quantization stores it as {' or '.join(dtypes)}")
        if (shapes and info.shape not in shapes) or (check is not None and not check(info.shape)):
            expected = (
                f"; the module's other tensors imply {' or '.join(str(list(s)) for s in shapes)}" if shapes else ""
            )
            raise self.malformed(info, f"has the shape {quoted(list(info.shape))}{expected}")
        return self._tensors.pop(name)

    def drop(self, *parts: str) -> None:
        """Remove parts of these names from all modules. Used for the scales of activations, which are not quantized."""
        for name in [name for name in self._tensors if name.endswith(tuple(f".{part}" for part in parts))]:
            del self._tensors[name]

    def put(self, module: str, shape: tuple[int, int], scheme: Scheme, parts: Mapping[str, TensorInfo]) -> None:
        """Add a module's weight of ``shape`` [outputs, inputs].

        Raises:
            ModelMalformed: the module has a weight already, or the weight is empty.
        """
        name, packed = f"{module}.weight", parts["weight"]
        if name in self._tensors:
            raise self.malformed(self._tensors[name], f"is stored beside {quoted(packed.name)}, which is quantized")
        if not all(shape):
            raise self.malformed(packed, f"has the shape {list(packed.shape)}: it holds no weights")
        self._tensors[name] = QuantizedTensor(
            name=name,
            shape=shape,
            dtype=packed.dtype,
            file=packed.file,
            offset=packed.offset,
            nbytes=sum(part.nbytes for part in parts.values()),
            scheme=scheme,
            parts=MappingProxyType(dict(parts)),
            outputs=shape[0],
        )

    def checkpoint(self) -> Checkpoint:
        """The tensors as they are now."""
        return Checkpoint(MappingProxyType(self._tensors), self._files)

    @staticmethod
    def malformed(info: TensorInfo, problem: str) -> ModelMalformed:
        """Make an error about a stored tensor."""
        return ModelMalformed(
            f"{info.file.name}: tensor {quoted(info.name)} {problem}.",
            hint="Does config.json belong to this checkpoint?",
        )

    def _where(self) -> str:
        return self._files[0].name if len(self._files) == 1 else str(self._files[0].parent)


def names(pattern: str, module: str) -> bool:
    """Whether an entry of a list means this module.

    ``pattern``: the module's path, whole components of the path, or ``re:`` and a regular expression that matches at
    the path's beginning.
    """
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return f".{pattern}." in f".{module}."


def groups_of(size: int) -> str:
    """A group size in words, for people."""
    return f"groups of {size}" if size > 0 else "one group a row"
