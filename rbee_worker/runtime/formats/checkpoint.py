"""Checkpoint: the tensors of a model and where they are stored. Every file format becomes one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

MAX_TENSORS = 2**17
"""Tensors allowed in one file. The largest models have more, in dozens of files."""

MAX_ELEMENTS = 2**63 - 1
"""Elements allowed in one tensor."""

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
        "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    }
)  # fmt: skip
"""Bytes per element of the safetensors dtypes that this worker reads."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor.

    Attributes:
        name: Hugging Face name, such as ``model.layers.0.mlp.up_proj.weight`` (names in GGUF files are mapped).
        shape: in Hugging Face order: of a matrix [outputs, inputs].
        dtype: as stored: ``F32``, ``BF16``, ``I8``… or a GGUF type such as ``Q4_1``.
        file: the file that holds it.
        offset: its first byte in the file.
        nbytes: its size in the file.
        rope_heads: the number of heads whose rows are permuted for ggml's interleaved rotary embedding (GGUF only).
            0: no row is permuted.
        shift: added to every value after decoding (GGUF only).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int
    rope_heads: int = 0
    shift: float = 0.0

    @property
    def parameters(self) -> int:
        """How many elements it has: the product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A read-only view of the tensors of one model.

    Attributes:
        tensors: by name. Plain ones stand in the order of the files and of the offsets in them.
        files: the files that hold the tensors.
    """

    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Stored bytes of each dtype, the largest number first."""
        counts: dict[str, int] = {}
        for info in self.tensors.values():
            counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
        return dict(sorted(counts.items(), key=lambda item: -item[1]))
