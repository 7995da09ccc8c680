"""What a model is and how much memory it needs, from headers and configs only. Does not import torch."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rbee_worker.errors import InvalidRequest
from rbee_worker.kernels.choice import BLOCK_TYPES, expected_variant
from rbee_worker.kernels.widths import quantized_bytes
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.architecture.roles import is_matrix, kinds_of_layers, layer_shapes, parameters
from rbee_worker.runtime.architecture.table import ARCHITECTURES
from rbee_worker.runtime.formats.as_stored import NO_KERNEL, can_be_mapped, resident_bytes, runs_as
from rbee_worker.runtime.formats.checkpoint import Checkpoint, TensorInfo
from rbee_worker.runtime.machine.storage import storage_of
from rbee_worker.runtime.source import ModelSource

_CACHE_ITEMSIZES = {"bfloat16": 2, "float16": 4, "float32": 4, "int8": 4}
"""Bytes of an element of the KV cache on a CPU, by dtype of the weights. A CPU computes in float32 with float16 and
int8 weights; on a GPU, and where the CPU kernels run, an element is half as large with float16."""
_KERNELS_ITEMSIZE = 2
"""Bytes of an element of the KV cache where the CPU kernels run."""
_ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of an element of the weights."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that a model takes on a CPU: weights, and the KV cache of one full context.

    ``dtype`` is that of the weights; ``int8`` means matrices quantized to int8, and the rest in 16 bits; where the CPU
    kernels run, there is ``int4`` too, and embedding and head are quantized with them; ``as stored``
    means matrices in the blocks of their file, where the CPU kernels multiply by these, and the rest as they need it.
    """

    dtype: str
    weights_bytes: int
    kv_cache_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What headers and configs say about a model.

    Attributes:
        family: the name of the architecture, for people.
        rope: the kind of rotary scaling.
        parameters: how many weights the model has; tied ones count once.
        active_parameters: how many of them one token goes through; fewer with a mixture of experts.
        file_bytes: bytes of all tensors in the files.
        dequantized_bytes: bytes of all weights in 16 bits.
        stored_as: what the files hold: ``BF16``, or ``gptq 4-bit, groups of 128, dequantized``.
        runs_as: what the matrices are multiplied as on this machine's CPU; where blocks are decoded, why.
        dtypes: stored dtype -> bytes.
        context_length: tokens that ``memory`` is computed for.
        max_context_length: the longest context that the model can run with, in tokens.
        chat_template: whether the model has a chat template.
        mapped_bytes: bytes of matrices that a load with ``mmap`` would use where their files are mapped; None: not
            asked for.
    """

    name: str
    format: str
    architecture: str
    family: str
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    rope: str
    parameters: int
    active_parameters: int
    tensors: int
    files: int
    file_bytes: int
    dequantized_bytes: int
    stored_as: str
    runs_as: str
    dtypes: dict[str, int]
    context_length: int
    max_context_length: int
    chat_template: bool
    memory: list[MemoryNeed]
    mapped_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; the keys are the names of the fields, without those that are None."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def inspect_model(source: ModelSource, context: int | None, *, mmap: bool = False) -> Inspection:
    """Inspect a model. Only headers and configs are read.

    Args:
        source: the model.
        context: tokens to compute the KV cache for; None: the model's default context.
        mmap: whether to say what would be mapped.

    Raises:
        ModelError: the files are malformed or unsupported.
        InvalidRequest: the context is longer than the model's longest; nothing can be mapped in this process.
    """
    config = source.model_config
    checkpoint = source.checkpoint
    weights, stored_as = source.weights
    stored = _AsStored.of(config, weights)
    length = config.context(context)
    return Inspection(
        name=source.name,
        format=source.format,
        architecture=config.architecture,
        family=ARCHITECTURES[config.architecture].family,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        attention_heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        rope=config.rope.kind,
        parameters=parameters(config),
        active_parameters=parameters(config, active=True),
        tensors=len(checkpoint.tensors),
        files=len(checkpoint.files),
        file_bytes=checkpoint.total_bytes,
        dequantized_bytes=2 * parameters(config),
        stored_as=stored_as,
        runs_as=stored.runs_as,
        dtypes=dict(checkpoint.dtypes),
        context_length=length,
        max_context_length=config.longest_context,
        chat_template="default" in source.chat_templates,
        memory=[
            *stored.needs(config, length),
            *(_need(dtype, size, config, length, kernels=stored.kernels) for dtype, size in _ITEMSIZES.items()),
            *(_quantized_needs(config, length) if stored.kernels else [_int8_need(config, length)]),
        ],
        mapped_bytes=stored.mapped_bytes(weights) if mmap else None,
    )


@dataclass(frozen=True, slots=True)
class _AsStored:
    """Stored tensors that a model needs, and the kernels that will run: the choice of ``choose_format``, for a CPU.

    Attributes:
        tensors: all but a head that is the embedding, and what no model needs.
        kernels: whether the CPU kernels run.
    """

    tensors: list[TensorInfo]
    kernels: bool

    @classmethod
    def of(cls, config: ModelConfig, checkpoint: Checkpoint) -> "_AsStored":
        architecture = ARCHITECTURES[config.architecture]
        head = architecture.head if config.tie_word_embeddings else None
        tensors = [
            info
            for name, info in checkpoint.tensors.items()
            if name != head and not name.endswith(architecture.ignored_suffixes)
        ]
        return cls(tensors, expected_variant() is not None)

    def stays(self, stored: str) -> bool:
        """Whether matrices of a stored type are multiplied as they are."""
        return self.kernels and stored in BLOCK_TYPES

    @property
    def plain(self) -> str:
        """The stored type of the 16-bit matrices that stay as they are; the others become this."""
        sizes = Counter({"F16": 0, "BF16": 0})
        for info in self.tensors:
            sizes[info.dtype] += info.nbytes
        return "BF16" if sizes["BF16"] > sizes["F16"] else "F16"

    @property
    def runs_as(self) -> str:
        """As the load report has it."""
        if not self.kernels:
            return runs_as(self.tensors, self.stays, "float16 or bfloat16", "no CPU kernels")
        return runs_as(self.tensors, self.stays, {"F16": "float16", "BF16": "bfloat16"}[self.plain], NO_KERNEL)

    def mapped_bytes(self, checkpoint: Checkpoint) -> int:
        """Stored bytes of matrices that are used where their files are mapped; none on a network.

        Raises:
            InvalidRequest: there are no kernels.
        """
        if not self.kernels:
            raise InvalidRequest(
                "mmap: only weights that run as they are stored can be mapped; here there are no CPU kernels.",
                hint="They are off, were not built, or do not run on this CPU. Load the model without mmap.",
            )
        if storage_of(checkpoint.files[0]).network:
            return 0
        return sum(info.nbytes for info in self.tensors if can_be_mapped(info, self.stays, self.plain))

    def needs(self, config: ModelConfig, context: int) -> list[MemoryNeed]:
        """The need with blocks as they are stored; none where there are no such blocks."""
        if not any(self.stays(info.dtype) for info in self.tensors):
            return []
        weights = resident_bytes(self.tensors, self.stays, matrix_itemsize=2, vector_itemsize=4)
        cache = context * config.kv_bytes_per_token(_KERNELS_ITEMSIZE)
        return [MemoryNeed("as stored", weights, cache, weights + cache)]


def _need(dtype: str, itemsize: int, config: ModelConfig, context: int, *, kernels: bool) -> MemoryNeed:
    weights = parameters(config) * itemsize
    element = _KERNELS_ITEMSIZE if kernels and dtype == "float16" else _CACHE_ITEMSIZES[dtype]
    cache = context * config.kv_bytes_per_token(element)
    return MemoryNeed(dtype, weights, cache, weights + cache)


def _quantized_needs(config: ModelConfig, context: int) -> list[MemoryNeed]:
    """The needs with matrices in the blocks of the CPU kernels, and norms in float32."""
    needs = []
    for name, bits in (("int8", 8), ("int4", 4)):
        table = quantized_bytes(bits, config.vocab_size, config.hidden_size, table=True)
        weights = table * (1 if config.tie_word_embeddings else 2) + 4 * config.hidden_size
        for index, count in kinds_of_layers(config):
            for role, shape in layer_shapes(config, index).items():
                size = quantized_bytes(bits, shape[0], shape[1]) if is_matrix(role) else 4 * math.prod(shape)
                weights += count * size
        cache = context * config.kv_bytes_per_token(_KERNELS_ITEMSIZE)
        needs.append(MemoryNeed(name, weights, cache, weights + cache))
    return needs


def _int8_need(config: ModelConfig, context: int) -> MemoryNeed:
    """The need with matrices in int8, 12 bytes more for each row, and embedding and norms in 16 bits."""
    head = (config.vocab_size, config.hidden_size)
    weights = head[0] * (head[1] + 12) + 2 * (math.prod(head) + config.hidden_size)
    for index, count in kinds_of_layers(config):
        for role, shape in layer_shapes(config, index).items():
            weights += count * (shape[0] * (shape[1] + 12) if is_matrix(role) else 2 * math.prod(shape))
    cache = context * config.kv_bytes_per_token(_CACHE_ITEMSIZES["int8"])
    return MemoryNeed("int8", weights, cache, weights + cache)
