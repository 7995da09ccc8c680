"""The report of a load that has ended well: the figures of its ``ready`` event."""

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from rbee_worker.config import DTypeName, EngineConfig
from rbee_worker.events import LoadReport
from rbee_worker.kernels.library import missing_reason
from rbee_worker.runtime.architecture.roles import STACKED, TABLES, is_matrix, parameters
from rbee_worker.runtime.formats.as_stored import NO_KERNEL, runs_as
from rbee_worker.runtime.formats.checkpoint import DTYPE_BYTES, TensorInfo
from rbee_worker.runtime.loading.fit import weights_bytes
from rbee_worker.runtime.loading.groups import WeightGroup
from rbee_worker.runtime.loading.plan import LoadPlan
from rbee_worker.runtime.machine.devices import MIB, peak_host_bytes
from rbee_worker.runtime.model.decoder import Transformer
from rbee_worker.runtime.model.linear.cpu import describe_kernels
from rbee_worker.runtime.model.linear.linear import choose_format, name_of


def make_report(
    plan: LoadPlan, asked: EngineConfig, transformer: Transformer, phases: dict[str, float], mapped: int
) -> LoadReport:
    """What a load reports: ``phases`` are seconds of each, ``mapped`` the bytes used where their files are mapped."""
    read, seconds = sum(info.nbytes for info in _stored(plan.groups)), phases["loading_to_vram"]
    return LoadReport(
        model=plan.source.name,
        architecture=plan.config.architecture,
        parameters=parameters(plan.config),
        dtype=plan.form.dtype_name,
        kernel=plan.form.kernel,
        cpu_kernels=describe_kernels() if plan.device.type == "cpu" else "",
        quantize=plan.form.quantize,
        saved_mb=_saved_bytes(plan) // MIB,
        phases=dict(phases),
        storage=_storage(plan, asked, mapped),
        stored_as=plan.stored_as,
        runs_as=_runs_as(plan),
        bytes_read=read,
        bytes_per_second=int(read / seconds) if seconds else read,
        device_mb={str(plan.device): transformer.nbytes // MIB},
        mapped_mb=mapped // MIB,
        context_length=plan.context_length,
        kv_cache_tokens=transformer.cache.positions,
        kv_cache_mb=transformer.cache.nbytes // MIB,
        kv_cache_dtype=name_of(transformer.cache.dtype),
        peak_host_mb=peak_host_bytes() // MIB,
    )


def _storage(plan: LoadPlan, asked: EngineConfig, mapped: int) -> str:
    if not asked.mmap:
        return str(plan.storage)
    return f"{plan.storage}, {'mapped' if mapped else 'not mapped'}"


def _stored(groups: Iterable[WeightGroup]) -> Iterator[TensorInfo]:
    return (info for group in groups for info in group.tensors.values())


def _runs_as(plan: LoadPlan) -> str:
    """What the matrices are multiplied as, the most bytes first; and where that is not what one expects, why."""
    form = plan.form
    other = "int8" if form.quantize == "int8" and not form.native else form.dtype_name
    if form.native and form.quantize != "none":
        return _quantized_as(plan, other)
    if form.as_stored:
        why = NO_KERNEL
    elif form.native or form.quantize != "none" or plan.device.type != "cpu" or missing_reason() is None:
        why = f"{other} was asked for"
    else:
        why = "no CPU kernels"
    return runs_as(_stored(plan.groups), form.keeps, other, why)


def _quantized_as(plan: LoadPlan, other: str) -> str:
    """The same where the kernels' blocks are made: what was quantized again, what stayed, and what no block fits."""
    form = plan.form
    sizes: Counter[str] = Counter()
    again: dict[str, None] = {}
    kept: dict[str, None] = {}
    odd: dict[str, None] = {}
    for role, info, columns in _matrices(plan):
        blocks = form.blocks_of(info.dtype, columns, table=role in TABLES)
        sizes[other if blocks is None else blocks.name] += info.nbytes
        if blocks is not None and blocks.name == info.dtype:
            kept[info.dtype] = None
        elif info.file.suffix == ".gguf" and info.dtype not in DTYPE_BYTES:
            again[info.dtype] = None
        if blocks is None:
            odd[f"rows of {columns} weights are no whole blocks"] = None
    notes = []
    if again:
        notes.append(f"{', '.join(again)} quantized again: {form.quantize} was asked for")
    if kept:
        notes.append(f"{', '.join(kept)} as stored: {form.quantize} was asked for, and they are no wider")
    notes += odd
    names = ", ".join(name for name, _ in sizes.most_common())
    return f"{names} ({'; '.join(notes)})" if notes else names


def _matrices(plan: LoadPlan) -> Iterator[tuple[str, TensorInfo, int]]:
    """Role, tensor and columns of each matrix of a table or a linear layer; all experts' may be one."""
    config = plan.config
    for role, info in (item for group in plan.groups for item in group.tensors.items()):
        if role in TABLES or is_matrix(role):
            yield role, info, info.shape[-1]
        elif config.experts is not None and role in STACKED:
            yield role, info, config.hidden_size if "gate_up" in role else config.experts.intermediate_size


def _saved_bytes(plan: LoadPlan) -> int:
    """Bytes of weights that quantizing saves against 16-bit ones on the same device."""
    if plan.form.quantize == "none":
        return 0
    dtype: DTypeName = "bfloat16" if plan.form.weight_dtype == torch.bfloat16 else "float16"
    sixteen_bit = choose_format(plan.device, dtype)
    return weights_bytes(plan.config, sixteen_bit) - weights_bytes(plan.config, plan.form)
