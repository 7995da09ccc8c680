"""Matrices that stay as they are stored: what they run as, the memory that they take, and which can be mapped."""

from collections import Counter
from collections.abc import Callable, Iterable

from rbee_worker.runtime.formats.checkpoint import DTYPE_BYTES, TensorInfo
from rbee_worker.runtime.formats.quantized.tensor import QuantizedTensor

MATRIX_DIMENSIONS = 2

NO_KERNEL = "no kernel multiplies by"
"""Why a type is decoded although the kernels run."""


def runs_as(tensors: Iterable[TensorInfo], stays: Callable[[str], bool], other: str, why: str) -> str:
    """What matrices are multiplied as, the most stored bytes first; and why not as the blocks that a GGUF file holds.

    Args:
        tensors: the stored ones; those of one dimension do not count.
        stays: whether a stored type is multiplied as it is.
        other: what the rest becomes.
        why: what is said of blocks that are decoded. To :data:`NO_KERNEL` it or them is added.
    """
    sizes: Counter[str] = Counter()
    decoded: dict[str, None] = {}
    for info in tensors:
        if len(info.shape) > 1:
            kept = stays(info.dtype)
            sizes[info.dtype if kept else other] += info.nbytes
            if not kept and info.file.suffix == ".gguf" and info.dtype not in DTYPE_BYTES:
                decoded[info.dtype] = None
    names = ", ".join(name for name, _ in sizes.most_common())
    if not decoded:
        return names
    if why == NO_KERNEL:
        why += " it" if len(decoded) == 1 else " them"
    return f"{names} ({', '.join(decoded)} decoded: {why})"


def resident_bytes(
    tensors: Iterable[TensorInfo], stays: Callable[[str], bool], *, matrix_itemsize: int, vector_itemsize: int
) -> int:
    """Bytes of weights where they are used: of what stays as it is stored, its own; the rest by its number of weights.

    Args:
        tensors: the stored ones.
        stays: whether a stored type is multiplied as it is.
        matrix_itemsize: bytes of each weight of the other matrices.
        vector_itemsize: the same for tensors of one dimension.
    """
    total = 0
    for info in tensors:
        itemsize = matrix_itemsize if len(info.shape) > 1 else vector_itemsize
        total += info.nbytes if stays(info.dtype) else info.parameters * itemsize
    return total


def can_be_mapped(info: TensorInfo, stays: Callable[[str], bool], plain: str) -> bool:
    """Whether a matrix can be used where its file is mapped: its bytes are what is multiplied, in their order.

    Args:
        info: the stored tensor.
        stays: whether blocks of a stored type are multiplied as they are.
        plain: the stored type of matrices that are multiplied in 16 bits as they are.
    """
    if isinstance(info, QuantizedTensor) or len(info.shape) != MATRIX_DIMENSIONS or info.rope_heads or info.shift:
        return False
    return stays(info.dtype) or (info.dtype == plain and info.offset % DTYPE_BYTES[plain] == 0)
