"""Loading a model: the phases, in the order in which their events come."""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Self, TypeVar

import torch

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import DEFAULT_MODEL, DTypeName, EngineConfig, Quantization
from rbee_worker.errors import Cancelled, InvalidRequest, OutOfMemory, RbeeError, Remedy, Setting, sentence
from rbee_worker.escape import one_line, reason
from rbee_worker.events import (
    LoadCancelled,
    LoadFailed,
    LoadingEvent,
    LoadingToVram,
    LoadReport,
    Ready,
    Resolving,
    Stalled,
    WarmingUp,
)
from rbee_worker.kernels.library import missing_reason
from rbee_worker.panics import panics_as_errors
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.architecture.roles import STACKED, TABLES, is_matrix, parameters
from rbee_worker.runtime.architecture.table import ARCHITECTURES
from rbee_worker.runtime.formats.as_stored import NO_KERNEL, runs_as
from rbee_worker.runtime.formats.checkpoint import DTYPE_BYTES, TensorInfo
from rbee_worker.runtime.grammar.compiler import GrammarCompiler
from rbee_worker.runtime.hub.download import DownloadProgress
from rbee_worker.runtime.loading.fit import (
    Way,
    cache_positions,
    check_fit,
    check_host,
    keeps_blocks,
    limit_context,
    resident_bytes,
    weights_bytes,
)
from rbee_worker.runtime.loading.mapping import MappedFile
from rbee_worker.runtime.loading.plan import WeightGroup, plan_weights
from rbee_worker.runtime.loading.reader import ReadState, WeightReader
from rbee_worker.runtime.machine.devices import (
    MIB,
    DeviceInfo,
    device_info,
    host_info,
    limit_threads,
    list_devices,
    peak_host_bytes,
    resolve_device,
    trim_host_memory,
)
from rbee_worker.runtime.machine.storage import Storage, storage_of
from rbee_worker.runtime.model.decoder import Batch, Transformer
from rbee_worker.runtime.model.linear.cpu import describe_kernels
from rbee_worker.runtime.model.linear.linear import LinearFormat, choose_format, int4_runs, name_of
from rbee_worker.runtime.source import ModelSource, fetch, locate
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer

_EVENT_SECONDS = 0.5
_WARM_UP_TOKENS = 16

_SMALLER: Mapping[Quantization, tuple[Quantization, ...]] = MappingProxyType(
    {"none": ("int8", "int4"), "int8": ("int4",), "int4": ()}
)
"""What a model may be quantized to instead, to take less memory."""

EventT = TypeVar("EventT", bound=LoadingEvent)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can run.

    Attributes:
        name: as shown to users.
        grammars: compiles what generated text must match.
        context_length: tokens of prompt and output together at most.
        embedding_bytes: bytes of the embedding where it is used.
        mapped_bytes: bytes of weights that are used where their files are mapped.
        mapped_files: these files.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    grammars: GrammarCompiler
    transformer: Transformer
    context_length: int
    embedding_bytes: int
    mapped_bytes: int
    mapped_files: tuple[MappedFile, ...]

    @classmethod
    def of(cls, plan: "LoadPlan", transformer: Transformer, read: ReadState) -> Self:
        """The model that a plan has become."""
        grammars = GrammarCompiler(plan.tokenizer, plan.config.vocab_size)
        return cls(
            plan.source.name,
            plan.config,
            plan.tokenizer,
            grammars,
            transformer,
            plan.context_length,
            embedding_bytes=resident_bytes([group for group in plan.groups if group.kind == "embedding"], plan.form),
            mapped_bytes=read.bytes_mapped,
            mapped_files=read.mapped_files,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.device

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the weights take."""
        return self.transformer.nbytes

    def check_files(self) -> None:
        """See whether the files that weights are mapped from are as they were.

        Raises:
            InferenceError: one of them is not.
        """
        for file in self.mapped_files:
            file.check_unchanged()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one token alone reads.

        All of them but an embedding that is not the head, of which it takes one row, and the experts that it does not
        go through.
        """
        skipped = 0.0
        if not self.config.tie_word_embeddings or self.transformer.form.packed:
            skipped += self.embedding_bytes
        if self.config.experts is not None:
            unused = 1 - self.config.experts.active / self.config.experts.count
            layers = zip(self.config.layers, self.transformer.layers, strict=True)
            skipped += sum(unused * layer.mlp.nbytes for traits, layer in layers if traits.experts)
        return round(self.nbytes - skipped)


class _Timeline:
    """Stamps events with ``seq`` and ``elapsed_seconds``, and keeps the seconds of each phase."""

    def __init__(self) -> None:
        self._started = self._phase_started = time.monotonic()
        self._next = 0
        self._phase = "resolving"
        self.phases: dict[str, float] = {}

    def event(self, cls: Callable[..., EventT], **values: object) -> EventT:
        seq, self._next = self._next, self._next + 1
        return cls(seq=seq, elapsed_seconds=round(time.monotonic() - self._started, 3), **values)

    def enter(self, phase: str) -> None:
        """End the current phase and begin another; an empty name only ends."""
        now = time.monotonic()
        spent = self.phases.get(self._phase, 0.0) + now - self._phase_started
        self.phases[self._phase] = round(spent, 3)
        self._phase, self._phase_started = phase, now


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


class _CancelledWith(Exception):
    """The load was cancelled while it held so many bytes of weights."""

    def __init__(self, nbytes: int = 0) -> None:
        super().__init__(nbytes)
        self.nbytes = nbytes


def load_model(
    model: str | None,
    config: EngineConfig,
    cancel: Cancellation,
    install: Callable[[LoadedModel], None],
    *,
    plan: LoadPlan | None = None,
    make_room: Callable[[], object] | None = None,
) -> Generator[LoadingEvent, None, None]:
    """Load a model and put it in its place, yielding what happens.

    ``resolving`` comes first; then everything that headers and configs tell is checked before memory is taken. The
    last event is terminal, whatever happens: ``ready`` comes after ``install`` has returned. Closing the generator, at
    any point, stops reading and frees what was taken.

    Args:
        model: what MODEL means on the command line; None: the embedded default.
        config: device, dtype, context.
        cancel: set it, from any thread, to end the load with ``cancelled``.
        install: makes the loaded model the one that runs. What it raises ends the load: Cancelled with ``cancelled``,
            anything else with ``error``.
        plan: of this model, where it was made already; see :func:`plan_local`.
        make_room: called once the model is known to be sound, before it takes memory; raises as ``install``.

    Raises:
        RbeeError: after the ``error`` event with the same code and message.
    """
    timeline = _Timeline()
    yield timeline.event(Resolving, model=model or DEFAULT_MODEL)
    freed = None
    try:
        with panics_as_errors():
            yield from _load(_Asked(model, config, cancel, install, plan, make_room), timeline)
    except _CancelledWith as cancelled:
        freed = cancelled.nbytes // MIB
    except RbeeError as error:
        yield timeline.event(LoadFailed, code=error.code, message=str(error))
        raise
    except Exception as error:
        if is_out_of_memory(error):
            failure = OutOfMemory(
                f"Memory ran out while loading: {sentence(_first_line(error))}",
                hint="Something else may have taken it.",
            )
            yield timeline.event(LoadFailed, code=failure.code, message=str(failure))
            raise failure from error
        # Watchers must have their terminal event whatever broke; the exception itself goes on to the driver.
        yield timeline.event(LoadFailed, code=RbeeError.code, message=failure_message(error))
        raise
    if freed is not None:
        # The exception is gone, and with it the frames that held the weights.
        release_memory()
        yield timeline.event(LoadCancelled, vram_mb_freed=freed)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The arguments of :func:`load_model`."""

    model: str | None
    config: EngineConfig
    cancel: Cancellation
    install: Callable[[LoadedModel], None]
    plan: LoadPlan | None
    make_room: Callable[[], object] | None


def _load(asked: _Asked, timeline: _Timeline) -> Generator[LoadingEvent, None, None]:
    """What follows ``resolving``, but for the events of an end without a model."""
    config, cancel, plan = asked.config, asked.cancel, asked.plan
    held = 0
    limit_threads()
    try:
        _check(cancel)
        if plan is None:
            if config.quantize != "none":  # what does not run here is refused before a model is downloaded
                choose_format(resolve_device(config.device), config.dtype, config.quantize)
            plan = make_plan((yield from _find(asked.model, timeline, config.stall_seconds, cancel)), config)
        if asked.make_room is not None:
            asked.make_room()
        check_room(plan, config)
        transformer = Transformer(plan.config, plan.form, plan.device, plan.context_length)
        timeline.enter("loading_to_vram")
        read = yield from _read_weights(plan, transformer, timeline, config.stall_seconds, cancel)
        held = transformer.nbytes
        _check(cancel)
        timeline.enter("warming_up")
        yield timeline.event(WarmingUp)
        _allocate_cache(plan, transformer, config, read.bytes_mapped)
        _warm_up(transformer)
        timeline.enter("")
        report = _report(plan, config, transformer, timeline.phases, read.bytes_mapped)
        _check(cancel)
        asked.install(LoadedModel.of(plan, transformer, read))
    except Cancelled as cancelled:
        raise _CancelledWith(held) from cancelled
    yield timeline.event(Ready, report=report)


def _check(cancel: Cancellation) -> None:
    if cancel.is_set():
        raise Cancelled("The load was cancelled.")


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
    groups = plan_weights(parsed, ARCHITECTURES[parsed.architecture], checkpoint)
    tokenizer = Tokenizer.from_files(source)
    device = resolve_device(config.device)
    storage = storage_of(checkpoint.files[0])
    mapped = config.mmap and not storage.network
    form = _form_of(groups, source.checkpoint.dtypes, device, config, config.quantize)
    if config.mmap and (not form.native or form.quantize != "none"):
        raise _cannot_map(device, form)
    length = limit_context(parsed, form, context=parsed.context(config.max_context), engine=config)
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


def has_room(plan: LoadPlan, config: EngineConfig, resident: LoadedModel | None, *, instead: bool = False) -> bool:
    """Whether a model fits into what is free now, beside a ``resident`` one, if there is one; or ``instead`` of it."""
    freed = 0
    if resident is not None and resident.device == plan.device:
        freed = resident.nbytes + resident.transformer.cache.nbytes if instead else 0
        freed -= resident.mapped_bytes  # the system counts these pages as free
    try:
        check_room(plan, config, freed)
    except OutOfMemory:
        return False
    return True


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; on CPUs torch says so with a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def failure_message(error: BaseException) -> str:
    """What a load says of an error that nobody expected."""
    return f"Loading failed: {sentence(reason(error))}"


def _first_line(error: Exception) -> str:
    return one_line((str(error).splitlines() or [type(error).__name__])[0])


def release_memory() -> None:
    """Give memory that nothing refers to any more back to the devices and the host."""
    trim_host_memory()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _find(
    model: str | None, timeline: _Timeline, stall_seconds: float, cancel: Cancellation
) -> Generator[LoadingEvent, None, ModelSource]:
    """The model's files, downloaded when they are the hub's; Cancelled when it was cancelled meanwhile."""
    located = locate(model)
    if isinstance(located, ModelSource):
        return located
    steps = fetch(located, stall_seconds=stall_seconds, cancel=cancel)
    downloading = False
    try:
        while True:
            step = next(steps)
            if isinstance(step, DownloadProgress) and not downloading:
                downloading = True
                timeline.enter("downloading")
            yield timeline.event(step.event)
    except StopIteration as end:
        if downloading:
            timeline.enter("resolving")
        found: ModelSource | None = end.value
        if found is None:
            raise Cancelled("The load was cancelled.") from None
        return found
    finally:
        steps.close()


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


def _read_weights(
    plan: LoadPlan, transformer: Transformer, timeline: _Timeline, stall_seconds: float, cancel: Cancellation
) -> Generator[LoadingEvent, None, ReadState]:
    """Place every part, until it is cancelled; returns what was read, and what is mapped."""
    reader = WeightReader(plan.groups, plan.config, plan.form, plan.device, plan.storage, mapped=plan.mapped)
    forget = cancel.on_set(reader.interrupt)
    state = reader.state
    progress = _Progress(plan, transformer, state, timeline, device_info(plan.device).total_bytes // MIB)
    waiting = len(plan.groups)
    stalled_at = event_at = time.monotonic()
    try:
        yield progress.event()
        while waiting:
            event_due = event_at + _EVENT_SECONDS
            stall_due = max(state.last_byte_at, stalled_at) + stall_seconds if state.reads else math.inf
            part = reader.next_part(min(event_due, stall_due) - time.monotonic())
            if cancel.is_set():
                break
            now = time.monotonic()
            if part is not None:
                transformer.place(part)
                waiting -= 1
            if part is not None or now >= event_due:
                event_at = now
                yield progress.event()
            if state.reads and now - max(state.last_byte_at, stalled_at) >= stall_seconds:
                stalled_at = now
                yield timeline.event(Stalled, seconds=round(now - state.last_byte_at, 1), where=state.reading)
        return state
    finally:
        forget()
        reader.close()


@dataclass(frozen=True, slots=True)
class _Progress:
    plan: LoadPlan
    transformer: Transformer
    state: ReadState
    timeline: _Timeline
    device_mb: int

    def event(self) -> LoadingToVram:
        state = self.state
        read, seconds = state.bytes_read, time.monotonic() - state.started_at
        rate = int(read / seconds) if seconds > 0 else 0
        return self.timeline.event(
            LoadingToVram,
            layers_loaded=len(self.transformer.layers),
            layers_total=self.plan.config.num_hidden_layers,
            vram_mb=self.transformer.nbytes // MIB,
            vram_total_mb=self.device_mb,
            device=str(self.plan.device),
            bytes_loaded=read,
            bytes_total=state.bytes_total,
            bytes_per_second=rate,
            # Of a hundredth no rate can be told: the first bytes wait for threads and buffers.
            eta_seconds=round((state.bytes_total - read) / rate, 1)
            if rate and read * 100 >= state.bytes_total
            else None,
        )


def _allocate_cache(plan: LoadPlan, transformer: Transformer, config: EngineConfig, mapped: int) -> None:
    """Take the KV cache's memory, of what is free now that the weights are there."""
    free = max(device_info(plan.device).free_bytes - mapped, 0)  # the system counts mapped pages as free
    positions = cache_positions(
        plan.config, plan.form, context=plan.context_length, engine=config, free=free, device=plan.device.type
    )
    transformer.allocate_cache(positions, config.kv_cache_dtype, prefix_cache=config.prefix_cache)


def _warm_up(transformer: Transformer) -> None:
    """Run one short prompt and one decode step, so that the first request pays for nothing of the kind."""
    device, cache = transformer.device, transformer.new_cache()
    length = min(_WARM_UP_TOKENS, transformer.context_length - 1)
    cache.reserve(length + 1)
    for tokens in (length, 1) if length else (1,):
        transformer.forward(Batch.of([(cache, [0] * tokens, 1)], device))
        cache.length += tokens
    cache.release()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _report(
    plan: LoadPlan, asked: EngineConfig, transformer: Transformer, phases: dict[str, float], mapped: int
) -> LoadReport:
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
