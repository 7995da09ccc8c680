"""Weights at the width that they are stored in, multiplied by the worker's own CPU kernels (``rbee_worker/kernels``).

16-bit weights are multiplied in float32. Weights in blocks are multiplied as bytes: the activations are rounded to
blocks of 32 bytes with a scale each, some of them twice (see ``kernels/formats.py``). Either way a token's result has
the same bits in any batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rbee_worker.kernels.arguments import StoredMatrix, StoredWeights
from rbee_worker.kernels.formats import FLOAT_FORMATS, Format
from rbee_worker.kernels.layer import LinearPart
from rbee_worker.kernels.library import Kernels
from rbee_worker.kernels.quantize import quantize


class StoredLinear:
    """One or more matrices of one width, their outputs side by side; float32 activations.

    Attributes:
        part: weights and bias; ``nbytes``: their bytes.
    """

    __slots__ = ("_kernels", "nbytes", "part")

    def __init__(self, kernels: Kernels, matrices: Sequence[StoredMatrix], bias: Tensor | None) -> None:
        """``bias``: [outputs], of any floating dtype."""
        self._kernels = kernels
        self.part = LinearPart(StoredWeights(matrices), None if bias is None else bias.float())
        self.nbytes = self.part.weights.nbytes + (self.part.bias.nbytes if self.part.bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.linear(x, self.part.weights, self.part.bias)


class StoredTable:
    """An embedding [vocab_size, hidden_size] as it is stored.

    Attributes:
        matrix: the weights; ``nbytes``: their bytes.
    """

    __slots__ = ("_kernels", "_weights", "matrix", "nbytes")

    def __init__(self, kernels: Kernels, matrix: StoredMatrix) -> None:
        self.matrix = matrix
        self._kernels = kernels
        self._weights = StoredWeights([matrix])
        self.nbytes = self._weights.nbytes

    def __call__(self, tokens: Tensor) -> Tensor:
        """Map int64 [tokens] to float32 [tokens, hidden_size]."""
        return self._kernels.rows(self._weights, tokens)


def plain_matrix(weight: Tensor) -> StoredMatrix:
    """Weights [outputs, inputs] of a floating dtype, as they are."""
    return StoredMatrix(weight.contiguous(), FLOAT_FORMATS[weight.dtype], weight.shape[0], weight.shape[1])


def quantized_matrix(weight: Tensor, blocks: Format) -> StoredMatrix:
    """Weights, float32 [outputs, inputs], rounded to blocks."""
    rows, columns = weight.shape
    data = torch.empty(rows, blocks.row_bytes(columns), dtype=torch.uint8)
    quantize(weight.contiguous(), blocks, data)
    return StoredMatrix(data, blocks, rows, columns)
