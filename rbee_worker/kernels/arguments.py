"""What the functions of the library take: C structures of addresses, and the classes that keep the tensors alive."""

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rbee_worker.kernels.formats import Format

GatedActivation = Literal["silu", "gelu", "gelu-tanh"]

ACTIVATIONS: dict[GatedActivation, int] = {"silu": 0, "gelu": 1, "gelu-tanh": 2}
"""``Activation`` of ``cpp/abi.h``."""


class Matrix(ctypes.Structure):
    """``Matrix`` of ``cpp/abi.h``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class Attention(ctypes.Structure):
    """``Attention`` of ``cpp/abi.h``."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("format", ctypes.c_int64),
        ("segments", ctypes.c_void_p),
        ("segment_count", ctypes.c_int64),
        ("runs", ctypes.c_void_p),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


class Norm(ctypes.Structure):
    """``Norm`` of ``cpp/abi.h``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("residual_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("multiplier", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


class Rotation(ctypes.Structure):
    """``Rotation`` of ``cpp/abi.h``."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("qkv_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("norm", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("rotary_dim", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        ("interleaved", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("unused", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """How tokens' queries and keys are rotated (see ``runtime/model/rope.py``). Made once in a step.

    Attributes:
        cos: float32 [rows, rotary_dim], contiguous; rotary_dim is even and at most a head's size.
        sin: with signs, as cos: x becomes ``x * cos + swap(x) * sin`` in the first rotary_dim dimensions of a head.
        rows: of these tables, int64 [tokens].
        interleaved: whether swap exchanges neighbours, or else halves.
    """

    cos: Tensor
    sin: Tensor
    rows: Tensor
    interleaved: bool = False

    def __post_init__(self) -> None:
        """Refuse tensors of another form.

        Raises:
            ValueError: a tensor is not as it should be.
        """
        check("cosines", self.cos, torch.float32, (self.cos.shape[0], self.cos.shape[-1] // 2 * 2))
        check("sines", self.sin, torch.float32, (*self.cos.shape,))
        check("rows", self.rows, torch.int64, (self.rows.numel(),))


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Weights as they are stored.

    Attributes:
        data: on the CPU, contiguous; of a block format uint8 [rows, bytes of a row], else [rows, columns] in its dtype.
        format: of the bytes.
        rows: outputs; ``columns``: inputs.
    """

    data: Tensor
    format: Format
    rows: int
    columns: int


class StoredWeights:
    """Matrices of one width that are multiplied together, their outputs side by side.

    Attributes:
        matrices: the parts, in the order of their outputs.
        outputs, inputs: of all of them; ``nbytes``: bytes of the weights.
    """

    __slots__ = ("_array", "address", "count", "inputs", "matrices", "nbytes", "outputs")

    def __init__(self, matrices: Sequence[StoredMatrix]) -> None:
        """Keep them, and their addresses for the library.

        Raises:
            ValueError: there are none, they are of several widths, or one is not as :class:`StoredMatrix` says.
        """
        self.matrices = tuple(matrices)
        if len({matrix.columns for matrix in self.matrices}) != 1:
            raise ValueError(f"matrices of one width are needed, not of {[matrix.columns for matrix in self.matrices]}")
        self.count = len(self.matrices)
        self.inputs = self.matrices[0].columns
        self.outputs = sum(matrix.rows for matrix in self.matrices)
        self.nbytes = sum(matrix.data.nbytes for matrix in self.matrices)
        self._array = (Matrix * self.count)(*map(_described, self.matrices))
        self.address = ctypes.addressof(self._array)


class Segments:
    """Whose tokens a batch holds, and where in the pool their positions lie. Made once in a step.

    Attributes:
        count: how many sequences there are; ``tokens``: of all of them.
        addresses: of ``Segment`` and ``Run`` in ``cpp/abi.h``.
    """

    __slots__ = ("_runs", "_segments", "addresses", "count", "tokens")

    def __init__(self, segments: Iterable[tuple[int, int, int, Sequence[tuple[int, int]]]]) -> None:
        """Describe sequences.

        Args:
            segments: of each its first row in the batch, its tokens there, the positions that it had before them, and
                its runs: pairs of a first position in the pool and the one after the last, which hold them all.

        Raises:
            ValueError: the runs of a sequence do not hold its positions.
        """
        described, runs, self.count, self.tokens = array("q"), array("q"), 0, 0
        for row, tokens, length, places in segments:
            described.extend((row, tokens, length, len(runs) // 3, len(places)))
            position = 0
            for begin, end in places:
                runs.extend((position, begin, end))
                position += end - begin
            if position < length + tokens or not places:
                raise ValueError(f"runs of {position} positions do not hold {length + tokens}")
            self.count += 1
            self.tokens = max(self.tokens, row + tokens)
        self._segments, self._runs = described, runs
        self.addresses = described.buffer_info()[0], runs.buffer_info()[0]


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse a tensor whose memory is not what the library takes it for."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} is {found}; {dtype} {list(shape)} is needed, contiguous and on cpu")


def _described(matrix: StoredMatrix) -> Matrix:
    data, stored = matrix.data, matrix.format
    row_bytes = stored.row_bytes(matrix.columns)
    check(f"a matrix of {stored.name}", data, stored.dtype, (matrix.rows, row_bytes // stored.dtype.itemsize))
    return Matrix(data.data_ptr(), matrix.rows, matrix.columns, row_bytes, stored.number, 0)
