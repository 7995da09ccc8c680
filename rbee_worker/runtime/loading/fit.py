"""Does it fit? Answered from headers and configs, before any memory is taken, with the remedies that would work.

What is needed, in bytes:

- weights: every matrix in the form it runs in, every other tensor in its dtype;
- cache: keys and values of one sequence as long as the context, or the memory that was set for the cache (without
  it the cache of all sequences is sized later, from what is left);
- workspace: the rotary tables, and the larger of what running takes (the activations of one prefill chunk, float32
  logits of a full batch) and what loading takes where weights are packed (a float32 copy of the largest fused matrix
  for each reader) or quantized to the kernels' blocks (a float32 copy of a part of one).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rbee_worker.config import EngineConfig
from rbee_worker.errors import OutOfMemory, Remedy, Setting
from rbee_worker.kernels.formats import Format
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.architecture.roles import TABLES, is_matrix, kinds_of_layers, layer_shapes
from rbee_worker.runtime.cache.block_pool import BLOCK_TOKENS
from rbee_worker.runtime.cache.kv_cache import blocks_for
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.loading.groups import WeightGroup
from rbee_worker.runtime.loading.parts import QUANTIZED_WEIGHTS
from rbee_worker.runtime.machine.devices import MIB, DeviceInfo
from rbee_worker.runtime.machine.storage import LOCAL_READERS
from rbee_worker.runtime.model.linear.linear import LinearFormat

_HOST_SHARE, _DEVICE_SHARE = 0.5, 0.9
"""Shares of the free memory that the KV cache may take: a host has other uses for it."""

_CONTEXT_STEP = 256
"""Contexts are proposed in multiples of this many tokens."""

Way = tuple[Mapping[Setting, str | int], LinearFormat, DeviceInfo]
"""A way to run a model: what is to be set for it, the form of its weights, and where."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a model takes on its device."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("cache", self.cache), ("workspace", self.workspace))
        return ", ".join(f"{name} {_mib(size)}" for name, size in parts)


def needs(config: ModelConfig, form: LinearFormat, context: int, engine: EngineConfig) -> Needs:
    """What a model takes in a form at a context length."""
    itemsize = form.activation_dtype.itemsize
    cache = engine.kv_cache_memory or context * _bytes_per_token(config, form, engine)
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    widths = 4 * config.hidden_size + 2 * heads * config.head_dim + 3 * config.intermediate_size
    running = min(engine.prefill_chunk, context) * widths * itemsize
    running += engine.max_batch_size * config.vocab_size * 4
    fused = config.hidden_size * max(heads * config.head_dim, 2 * config.intermediate_size)
    loading = LOCAL_READERS * 4 * (fused if form.packed else QUANTIZED_WEIGHTS if form.quantize != "none" else 0)
    rotary = (2 + 2 * (config.local_rope is not None)) * context * config.rotary_dim * 4
    return Needs(weights_bytes(config, form), cache, max(running, loading) + rotary)


def limit_context(config: ModelConfig, form: LinearFormat, *, context: int, engine: EngineConfig) -> int:
    """The context that the memory set for the KV cache has room for, of the one asked for.

    Raises:
        OutOfMemory: less than the context that was set, or than one block.
    """
    if engine.kv_cache_memory is None:
        return context
    per_token = _bytes_per_token(config, form, engine)
    positions = engine.kv_cache_memory // per_token // BLOCK_TOKENS * BLOCK_TOKENS
    if positions < (engine.max_context or BLOCK_TOKENS):
        wanted = engine.max_context or context
        size = -(-blocks_for(wanted) * BLOCK_TOKENS * per_token // MIB)
        remedies = [Remedy({"kv_cache_memory": f"{size}MiB"})]
        remedies += [Remedy({"max_context": positions})] if positions else []
        raise OutOfMemory(
            f"A KV cache of {_mib(engine.kv_cache_memory)} holds {positions:,} tokens of this model, "
            f"fewer than the {wanted:,} of its context.",
            remedies=remedies,
        )
    return min(context, positions)


def cache_positions(
    config: ModelConfig, form: LinearFormat, *, context: int, engine: EngineConfig, free: int, device: str
) -> int:
    """Tokens that the KV cache is to hold: what was set, else a whole context for each place in the batch.

    Where nothing was set it takes a share of the ``free`` bytes of its ``device`` at most, but one whole context at
    least.
    """
    per_token = _bytes_per_token(config, form, engine)
    if engine.kv_cache_memory is not None:
        return engine.kv_cache_memory // per_token
    share = int(free * (_HOST_SHARE if device == "cpu" else _DEVICE_SHARE)) // per_token
    return min(engine.max_batch_size * context, max(context, share))


def _bytes_per_token(config: ModelConfig, form: LinearFormat, engine: EngineConfig) -> int:
    return config.kv_bytes_per_token(form.cache_dtype(engine.kv_cache_dtype).itemsize)


def weights_bytes(config: ModelConfig, form: LinearFormat) -> int:
    """Bytes of all weights where they are used; a packed head tied to the embedding is a second copy."""
    if form.resident_bytes is not None:
        return form.resident_bytes
    head = form.linear_bytes(config.vocab_size, config.hidden_size, table=True)
    table = head if form.native else config.vocab_size * config.hidden_size * form.weight_dtype.itemsize
    if config.tie_word_embeddings and not form.packed:
        head = 0
    total = sum(count * _layer_bytes(config, form, index) for index, count in kinds_of_layers(config))
    return total + table + head + config.hidden_size * form.activation_dtype.itemsize


def resident_bytes(groups: Iterable[WeightGroup], form: LinearFormat) -> int:
    """Bytes of all weights where they are used, by what is stored: matrices in their blocks or in the form's dtype."""
    total = 0
    for role, info in (item for group in groups for item in group.tensors.items()):
        blocks = stored_blocks(form, role, info)
        if blocks is not None:
            total += math.prod(info.shape[:-1]) * blocks.row_bytes(info.shape[-1])
        else:
            dtype = form.weight_dtype if role in TABLES or is_matrix(role) else form.activation_dtype
            total += info.parameters * dtype.itemsize
    return total


def keeps_blocks(groups: Iterable[WeightGroup], form: LinearFormat) -> bool:
    """Whether a matrix stays in the blocks of its file."""
    return any(
        (blocks := stored_blocks(form, role, info)) is not None and blocks.name == info.dtype
        for group in groups
        for role, info in group.tensors.items()
    )


def stored_blocks(form: LinearFormat, role: str, info: TensorInfo) -> Format | None:
    """The blocks that a tensor with this role is held in; None: it is held as numbers."""
    if role not in TABLES and not is_matrix(role):
        return None
    return form.blocks_of(info.dtype, info.shape[-1], table=role in TABLES)


def _layer_bytes(config: ModelConfig, form: LinearFormat, index: int) -> int:
    matrices, others = 0, 0
    for role, shape in layer_shapes(config, index).items():
        if is_matrix(role):
            matrices += form.linear_bytes(shape[0], shape[1])
        else:
            others += math.prod(shape)
    return matrices + others * form.activation_dtype.itemsize


def check_fit(
    name: str,
    config: ModelConfig,
    form: LinearFormat,
    *,
    context: int,
    engine: EngineConfig,
    device: DeviceInfo,
    alternatives: Callable[[], Sequence[Way]],
) -> Needs:
    """Refuse what cannot fit.

    Args:
        name: the model, for the message.
        config: its shapes.
        form: how its weights are to be held.
        context: tokens to serve.
        engine: prefill chunk and batch size.
        device: where it is to go, with its free memory now.
        alternatives: other ways to run it, asked for only when needed.

    Returns:
        What it will take.

    Raises:
        OutOfMemory: with the figures, and each remedy that would work.
    """
    needed = needs(config, form, context, engine)
    if needed.total <= device.free_bytes:
        return needed
    remedies = list(_remedies(config, context, engine, [({}, form, device), *alternatives()]))
    nothing = "No option makes it fit on this machine as it is: free memory, or use a smaller model."
    raise OutOfMemory(
        f"{name} needs {_mib(needed.total)} on {device.name} ({needed}, at a context of {context:,} tokens); "
        f"{_mib(device.free_bytes)} of {_mib(device.total_bytes)} are free.",
        hint=None if remedies else nothing,
        remedies=remedies,
    )


def check_host(name: str, groups: Sequence[WeightGroup], host: DeviceInfo) -> None:
    """Refuse what could not pass through the host's memory on its way to another device: two groups at a time.

    Raises:
        OutOfMemory: with the figures.
    """
    sizes = sorted(sum(info.nbytes for info in group.tensors.values()) for group in groups)
    passing = sum(sizes[-2:])
    if passing > host.free_bytes:
        raise OutOfMemory(
            f"{name} passes through {_mib(passing)} of host memory on its way; "
            f"{_mib(host.free_bytes)} of {_mib(host.total_bytes)} are free.",
            hint="Free memory on the host.",
        )


def _remedies(config: ModelConfig, context: int, engine: EngineConfig, ways: Sequence[Way]) -> Iterator[Remedy]:
    """Each way as it is where that fits, else with the longest context that does."""
    for settings, form, device in ways:
        whole = needs(config, form, context, engine)
        if whole.total <= device.free_bytes:
            yield Remedy(settings, round(whole.total / MIB))
            continue
        shorter = _longest_context(config, form, context, engine, device.free_bytes)
        if shorter:
            fitting = needs(config, form, shorter, engine)
            yield Remedy({**settings, "max_context": shorter}, round(fitting.total / MIB))
        elif engine.kv_cache_memory is not None:
            smaller = needs(config, form, context, replace(engine, kv_cache_memory=None))
            if smaller.total <= device.free_bytes:
                size = smaller.cache + device.free_bytes - smaller.total
                yield Remedy({**settings, "kv_cache_memory": f"{size // MIB}MiB"}, round(smaller.total / MIB))


def _longest_context(config: ModelConfig, form: LinearFormat, context: int, engine: EngineConfig, free: int) -> int:
    """The longest context, in steps, that fits into ``free`` bytes; 0: none does."""
    low, high = 0, context // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if needs(config, form, middle * _CONTEXT_STEP, engine).total <= free:
            low = middle
        else:
            high = middle - 1
    return low * _CONTEXT_STEP


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
