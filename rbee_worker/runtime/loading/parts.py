"""From tensors in files to the parts of a decoder: in what memory each part is put together.

A dense matrix is allocated once, at its final size, and its tensors (q, k and v side by side) are read into
their rows of it. A packed matrix is put together in a staging buffer, which the thread uses again for the next one;
a head is packed in blocks of rows that are no larger. The embedding and the output come first, and the largest matrix
of a layer before the others, so that the staging is fullest while the most of the model is still missing.
"""

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rbee_worker.errors import ModelUnsupported, Remedy
from rbee_worker.escape import quoted
from rbee_worker.kernels.arguments import StoredMatrix
from rbee_worker.kernels.formats import FLOAT_FORMATS, Format
from rbee_worker.kernels.quantize import largest_weight, quantize
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.architecture.roles import of_linear
from rbee_worker.runtime.formats.as_stored import can_be_mapped
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.quantized.tensor import QuantizedTensor
from rbee_worker.runtime.formats.stacked_experts import read_expert
from rbee_worker.runtime.loading.groups import WeightGroup
from rbee_worker.runtime.model.decoder import (
    ATTENTION_LINEARS,
    MLP,
    MLP_LINEARS,
    DecoderLayer,
    Embedding,
    Output,
    ParallelLayer,
    Part,
    SelfAttention,
)
from rbee_worker.runtime.model.linear.linear import DenseLinear, Linear, LinearFormat, kernels_of, make_linear
from rbee_worker.runtime.model.linear.stored import StoredLinear, StoredTable, plain_matrix
from rbee_worker.runtime.model.moe import Experts

_BLOCK_WEIGHTS = 16 * 2**20
"""A head is packed in blocks of this many weights, or of the largest matrix of a layer where that is more."""

_TOGETHER = 8
"""Rows that a quantized head may have packed into one word: blocks end where words do."""

QUANTIZED_WEIGHTS = 4 * 2**20
"""Weights that are read, in float32, and then quantized to the kernels' blocks, by each reading thread."""

_MMAP_BYTES = 2**20

Read = Callable[[TensorInfo, Tensor, torch.dtype], None]
"""Fills a contiguous tensor of ``info.shape``, of any floating dtype and on any device, from the file; the last is the
dtype that the values will be kept in, which may be a smaller one."""


class RowBlocks:
    """A linear layer in blocks of output features, each a linear layer of its own."""

    __slots__ = ("_blocks", "nbytes")

    def __init__(self, blocks: Sequence[Linear]) -> None:
        self._blocks = blocks
        self.nbytes = sum(block.nbytes for block in blocks)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([block(x) for block in self._blocks], dim=-1)


class PartBuilder:
    """Builds parts of a decoder, one at a time, reading each tensor to where it is needed."""

    def __init__(
        self,
        config: ModelConfig,
        form: LinearFormat,
        device: torch.device,
        read: Read,
        map_in: Callable[[TensorInfo, torch.dtype], Tensor] | None = None,
    ) -> None:
        """``map_in``: gives a stored matrix's bytes, uint8 [nbytes], where its file is mapped; None: all are read."""
        self._config, self._form, self._device, self._read = config, form, device, read
        self._kernels = kernels_of(form)
        self._map_in = map_in
        self._staging = torch.empty(0, dtype=torch.uint8, device=device)
        # Quantized weights have scales, which hold what float32 holds.
        self._held = form.weight_dtype if form.quantize == "none" else torch.float32

    def build(self, group: WeightGroup, *, last: bool = False) -> Part:
        """The part that a group of tensors becomes, resident on its device.

        Args:
            group: the tensors.
            last: hardly anything is left to be loaded after it: the staging is let go after each matrix, since from
                here on it would come on top of the whole model.
        """
        tensors = group.tensors
        if group.kind == "embedding":
            return self._embedding(tensors["embedding"])
        vectors = {
            role: self._vector(role, info) for role, info in tensors.items() if not of_linear(role) and role != "head"
        }
        if group.kind == "output":
            head = tensors.get("head")
            return Output(self._config, vectors, None if head is None else self._head(head), self._kernels)
        return self._layer(group, vectors, last=last)

    def _layer(self, group: WeightGroup, vectors: dict[str, Tensor], *, last: bool) -> DecoderLayer:
        config = self._config
        traits, experts = config.layers[group.index], config.experts

        def linears(fused: Mapping[str, tuple[str, ...]], prefix: str = "") -> dict[str, Linear]:
            made = {}
            for name, roles in fused.items():
                made[name] = self._fused(
                    group.tensors, prefix, (name,) if f"{prefix}{name}.weight" in group.tensors else roles
                )
                if last:
                    self._release()
            return made

        mlp: MLP | Experts
        if traits.experts and experts is not None:
            numbers = range(experts.count)
            if "experts.down_bias" in group.tensors:
                matrices = [self._stacked(group.tensors, number) for number in numbers]
            else:
                matrices = [linears(MLP_LINEARS, f"experts.{number}.") for number in numbers]
            mlp = Experts(config.activation, experts, self._router(vectors), matrices, kernels=self._kernels)
        else:
            mlp = MLP(config, linears(MLP_LINEARS), self._kernels)
        attention = SelfAttention(config, group.index, vectors, linears(ATTENTION_LINEARS))
        layer = ParallelLayer if config.norm_placement == "shared" else DecoderLayer
        return layer(config, vectors, attention, mlp, self._kernels)

    def _vector(self, role: str, info: TensorInfo) -> Tensor:
        # Weights that are added to one, and those that choose experts, are not rounded further than they are stored.
        exact = self._config.norm == "rms-offset" or role.startswith(("router", "sinks"))
        return self._plain([info], torch.float32 if exact else self._form.activation_dtype)

    def _plain(self, infos: Sequence[TensorInfo], dtype: torch.dtype) -> Tensor:
        """Tensors in memory of their own, stacked along their first dimension."""
        rows = sum(info.shape[0] for info in infos)
        return self._filled(infos, empty_on(self._device, (rows, *infos[0].shape[1:]), dtype), dtype)

    def _filled(self, infos: Sequence[TensorInfo], target: Tensor, held: torch.dtype) -> Tensor:
        begin = 0
        for info in infos:
            self._read(info, target[begin : begin + info.shape[0]], held)
            begin += info.shape[0]
        return target

    def _staged(self, rows: int, columns: int) -> Tensor:
        """Memory for a matrix that is about to be packed; it holds until the next call."""
        dtype = self._form.weight_dtype if self._form.kernel == "packed-bf16" else torch.float32
        nbytes = rows * columns * dtype.itemsize
        if self._staging.nbytes < nbytes:
            self._release()
            self._staging = empty_on(self._device, (nbytes,), torch.uint8)
        return self._staging[:nbytes].view(dtype).view(rows, columns)

    def _release(self) -> None:
        self._staging = self._staging.new_empty(0)

    def _fused(self, tensors: dict[str, TensorInfo], prefix: str, roles: tuple[str, ...]) -> Linear:
        matrices = [tensors[f"{prefix}{role}.weight"] for role in roles]
        biases = [tensors[f"{prefix}{role}.bias"] for role in roles if f"{prefix}{role}.bias" in tensors]
        bias = self._plain(biases, self._form.activation_dtype) if biases else None
        if self._kernels is not None:
            return StoredLinear(self._kernels, [self._stored(info) for info in matrices], bias)
        if not self._form.packed:
            return make_linear(self._plain(matrices, self._form.weight_dtype), bias, self._form)
        staged = self._staged(sum(info.shape[0] for info in matrices), matrices[0].shape[1])
        return make_linear(self._filled(matrices, staged, self._held), bias, self._form)

    def _stored(self, info: TensorInfo, *, table: bool = False) -> StoredMatrix:
        """A matrix in memory of its own, or where its file is mapped: as it is stored, quantized, or in 16 bits."""
        form = self._form
        rows, columns = info.shape
        blocks, held = form.blocks_of(info.dtype, columns, table=table), form.weight_dtype
        mapped = None
        if self._map_in is not None and can_be_mapped(info, form.keeps, FLOAT_FORMATS[held].name):
            mapped = self._map_in(info, held if blocks is None else torch.uint8)
        if blocks is None:
            return plain_matrix(self._plain([info], held) if mapped is None else mapped.view(held).view(info.shape))
        row_bytes = blocks.row_bytes(columns)
        if mapped is not None:
            return StoredMatrix(mapped.view(rows, row_bytes), blocks, rows, columns)
        data = empty_on(self._device, (rows, row_bytes), torch.uint8)
        if info.dtype == blocks.name:
            self._read(info, data, torch.uint8)
        else:
            self._quantize(info, blocks, data)
        return StoredMatrix(data, blocks, rows, columns)

    def _quantize(self, info: TensorInfo, blocks: Format, data: Tensor) -> None:
        """Fill ``data`` with a matrix's weights in blocks, some rows at a time.

        Raises:
            ModelUnsupported: a weight is too large for the blocks' scales.
        """
        rows, columns = info.shape
        together = rows // info.rope_heads if info.rope_heads else _TOGETHER
        step = max(1, QUANTIZED_WEIGHTS // (columns * together)) * together
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            values = self._staged(end - begin, columns)
            self._read(rows_of(info, begin, end), values, self._held)
            _check_size(info, values, blocks)
            quantize(values, blocks, data[begin:end])

    def _stacked(self, tensors: dict[str, TensorInfo], number: int) -> dict[str, Linear]:
        """An expert's linear layers, from tensors that hold all experts'.

        Raises:
            ModelUnsupported: a weight is too large for the scales of the blocks that it is quantized to.
        """
        made = {}
        for role in MLP_LINEARS:
            weight, bias = read_expert(tensors, role, number, self._read, device=self._device, held=self._held)
            blocks = self._form.blocks_of("", weight.shape[1])
            if blocks is not None:
                info = tensors.get(f"experts.{role}")
                _check_size(tensors[f"experts.{role}_scales"] if info is None else info, weight, blocks)
            made[role] = make_linear(weight, bias.to(self._form.activation_dtype), self._form)
        return made

    def _router(self, vectors: Mapping[str, Tensor]) -> Linear:
        weight, bias = vectors["router.weight"], vectors.get("router.bias")
        if self._kernels is not None:
            return StoredLinear(self._kernels, [plain_matrix(weight)], bias)
        return DenseLinear(weight, bias)

    def _embedding(self, info: TensorInfo) -> Embedding:
        if self._kernels is not None:
            stored = StoredTable(self._kernels, self._stored(info, table=True))
            tied = StoredLinear(self._kernels, [stored.matrix], None) if self._config.tie_word_embeddings else None
            return Embedding(stored, tied, self._config.embedding_multiplier, shared=True)
        table = self._plain([info], self._form.weight_dtype)
        multiplier = self._config.embedding_multiplier
        if not self._config.tie_word_embeddings:
            return Embedding(table, multiplier=multiplier)
        if not self._form.packed:
            return Embedding(table, make_linear(table, None, self._form), multiplier, shared=True)

        def fill(begin: int, block: Tensor) -> None:
            block.copy_(table[begin : begin + len(block)])

        return Embedding(table, self._packed(info.shape, fill), multiplier)

    def _head(self, info: TensorInfo) -> Linear:
        if self._kernels is not None:
            return StoredLinear(self._kernels, [self._stored(info, table=True)], None)
        if not self._form.packed:
            return make_linear(self._plain([info], self._form.weight_dtype), None, self._form)

        def fill(begin: int, block: Tensor) -> None:
            self._read(rows_of(info, begin, begin + len(block)), block, self._held)

        return self._packed(info.shape, fill)

    def _packed(self, shape: Sequence[int], fill: Callable[[int, Tensor], None]) -> Linear:
        """A head in blocks of rows, so that it is never whole in any form but the packed one."""
        rows, columns = shape
        largest = max(2 * self._config.intermediate_size, self._config.hidden_size) * self._config.hidden_size
        step = max(1, max(_BLOCK_WEIGHTS, largest) // (columns * _TOGETHER)) * _TOGETHER
        blocks = []
        for begin in range(0, rows, step):
            staged = self._staged(min(step, rows - begin), columns)
            fill(begin, staged)
            blocks.append(make_linear(staged, None, self._form))
        return blocks[0] if len(blocks) == 1 else RowBlocks(blocks)


def rows_of(info: TensorInfo, begin: int, end: int) -> TensorInfo:
    """Rows ``begin`` to ``end`` of a stored matrix, as a tensor of their own; whole heads where heads are permuted."""
    if isinstance(info, QuantizedTensor):
        return info.rows(begin, end)
    rows = info.shape[0]
    stride = info.nbytes // rows
    return replace(
        info,
        shape=(end - begin, *info.shape[1:]),
        offset=info.offset + begin * stride,
        nbytes=(end - begin) * stride,
        rope_heads=info.rope_heads * (end - begin) // rows,
    )


def empty_on(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory.

    On the host a large tensor has a mapping of its own, so that its memory goes back to the system when the tensor
    goes, whatever malloc would hold on to.

    Raises:
        MemoryError: there is none left.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or nbytes < _MMAP_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes: {error.strerror}") from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _check_size(info: TensorInfo, values: Tensor, blocks: Format) -> None:
    """Refuse weights that the scales of the blocks they are quantized to cannot hold.

    Raises:
        ModelUnsupported: a weight is too large.
    """
    lowest, highest = (float(bound) for bound in values.aminmax())
    if max(-lowest, highest) > largest_weight(blocks):
        raise ModelUnsupported(
            f"{info.file.name}: tensor {quoted(info.name)} holds {max(lowest, highest, key=abs):g}. "
            f"Blocks of {blocks.name} have scales in float16 and hold {largest_weight(blocks):g} at most.",
            remedies=[Remedy({"quantize": "none", "dtype": "bfloat16"})],
        )
