"""What is known of a load before it takes memory, and whether there is room for it."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from rbee_worker.config import EngineConfig, Quantization
from rbee_worker.errors import InvalidRequest, RbeeError, Remedy, Setting
from rbee_worker.kernels.library import missing_reason
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.architecture.table import ARCHITECTURES
from rbee_worker.runtime.loading.fit import (
    Way,
    check_fit,
    check_host,
    keeps_blocks,
    limit_context,
    resident_bytes,
    weights_bytes,
)
from rbee_worker.runtime.loading.groups import WeightGroup, group_weights
from rbee_worker.runtime.machine.devices import DeviceInfo, device_info, host_info, list_devices, resolve_device
from rbee_worker.runtime.machine.storage import Storage, storage_of
from rbee_worker.runtime.model.linear.linear import LinearFormat, choose_format, int4_runs
from rbee_worker.runtime.source import ModelSource, locate
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer

_SMALLER: Mapping[Quantization, tuple[Quantization, ...]] = MappingProxyType(
    {"none": ("int8", "int4"), "int8": ("int4",), "int4": ()}
)
"""What a model may be quantized to instead, to take less memory."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """All that headers and configs tell of a load, read once, before any memory is taken.

    Attributes:
        source: the model's files.
        config: what the decoder needs to know.
        tokenizer: of the model.
        groups: the stored tensors, by the part of the decoder that they become, in loading order.
        device: where the weights go.
        form: how they are held there.
        context_length: tokens of prompt and output together at most.
        storage: what the files lie on, and how it is read.
        stored_as: how the weights are stored, for people.
        mapped: whether matrices that run as they are stored are used where their files are mapped.
    """

    source: ModelSource
    config: ModelConfig
    tokenizer: Tokenizer
    groups: list[WeightGroup]
    device: torch.device
    form: LinearFormat
    context_length: int
    storage: Storage
    stored_as: str
    mapped: bool


def make_plan(source: ModelSource, config: EngineConfig) -> LoadPlan:
    """Read headers, configs and the tokenizer, and check them against each other; takes no memory for weights.

    Raises:
        ModelError: a file is malformed, or the model is not supported.
        InvalidRequest: the files are to be mapped, and the weights do not run as they are stored.
        OutOfMemory: the limit on the KV cache is too small for the context.
        DeviceUnavailable: the device is not there.
    """
    parsed = source.model_config
    checkpoint, stored_as = source.weights
    groups = group_weights(parsed, ARCHITECTURES[parsed.architecture], checkpoint)
    tokenizer = Tokenizer.from_files(source)
    device = resolve_device(config.device)
    storage = storage_of(checkpoint.files[0])
    mapped = config.mmap and not storage.network
    form = _form_of(groups, source.checkpoint.dtypes, device, config, config.quantize)
    if config.mmap and (not form.native or form.quantize != "none"):
        raise _cannot_map(device, form)
    length = limit_context(parsed, form, context=parsed.context(config.max_context), engine=config)
    tokenizer.context_length = length
    return LoadPlan(source, parsed, tokenizer, groups, device, form, length, storage, stored_as, mapped)


def _cannot_map(device: torch.device, form: LinearFormat) -> InvalidRequest:
    if device.type != "cpu":
        why, remedies = f"they go to {device}", [Remedy({"device": "cpu"})]
    elif form.quantize != "none":
        why, remedies = f"they become {form.quantize} as they are loaded", [Remedy({"quantize": "none"})]
    elif (missing := missing_reason()) is not None:
        why, remedies = f"there are no CPU kernels ({missing.removesuffix('.')})", []
    else:
        why, remedies = f"they become {form.dtype_name} as they are loaded", [Remedy({"dtype": "auto"})]
    return InvalidRequest(
        f"mmap: only weights that run as they are stored can be mapped; here {why}.",
        hint=None if remedies else "Load the model without mmap.",
        remedies=remedies,
    )


def _form_of(
    groups: Sequence[WeightGroup],
    stored: Mapping[str, int],
    device: torch.device,
    config: EngineConfig,
    quantize: Quantization,
) -> LinearFormat:
    """The form of a model's weights, with their size where that depends on what is stored."""
    form = choose_format(device, config.dtype, quantize, stored, mapped=config.mmap and quantize == "none")
    return replace(form, resident_bytes=resident_bytes(groups, form)) if keeps_blocks(groups, form) else form


def plan_local(model: str | None, config: EngineConfig) -> LoadPlan | None:
    """The plan of a model whose files are here; None where it must be downloaded first, or is wrong: its load tells."""
    try:
        located = locate(model)
        return make_plan(located, config) if isinstance(located, ModelSource) else None
    except RbeeError:
        return None


def check_room(plan: LoadPlan, config: EngineConfig, freed: int = 0) -> None:
    """Refuse a model that does not fit into what is free now, and ``freed`` more bytes.

    Raises:
        OutOfMemory: with the figures and the remedies.
    """
    place = device_info(plan.device)
    place = replace(place, free_bytes=place.free_bytes + freed)
    ways = functools.partial(_alternatives, plan, config, place)
    name, length = plan.source.name, plan.context_length
    check_fit(name, plan.config, plan.form, context=length, engine=config, device=place, alternatives=ways)
    if plan.device.type != "cpu":
        check_host(name, plan.groups, host_info())


def _alternatives(plan: LoadPlan, config: EngineConfig, place: DeviceInfo) -> list[Way]:
    """Other ways to run a model that does not fit: quantized in the same place, and on every other device."""
    form_of = functools.partial(_form_of, plan.groups, plan.source.checkpoint.dtypes)
    ways: list[Way] = []
    for info in list_devices():
        device = resolve_device(info.name)
        there: dict[Setting, str | int] = {} if info.name == place.name else {"device": info.name}
        if there and (config.quantize != "int4" or int4_runs(device)):
            ways.append((there, form_of(device, config, config.quantize), info))
        least = weights_bytes(plan.config, plan.form)
        for quantize in _SMALLER[config.quantize]:
            if int4_runs(device) if quantize == "int4" else device.type != "mps":
                form = form_of(device, config, quantize)
                size = weights_bytes(plan.config, form)
                if there or size < least:  # a model that is stored in fewer bits gains nothing
                    ways.append(({**there, "quantize": quantize}, form, info))
                    least = min(size, least)
    return ways
