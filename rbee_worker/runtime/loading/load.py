"""Loading a model: the phases, in the order in which their events come."""

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Self, TypeVar

import torch

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import DEFAULT_MODEL, EngineConfig
from rbee_worker.errors import Cancelled, OutOfMemory, RbeeError, sentence
from rbee_worker.escape import one_line, reason
from rbee_worker.events import (
    LoadCancelled,
    LoadFailed,
    LoadingEvent,
    LoadingToVram,
    Ready,
    Resolving,
    Stalled,
    WarmingUp,
)
from rbee_worker.panics import panics_as_errors
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.grammar.compiler import GrammarCompiler
from rbee_worker.runtime.hub.download import DownloadProgress
from rbee_worker.runtime.loading.fit import cache_positions, resident_bytes
from rbee_worker.runtime.loading.mapping import MappedFile
from rbee_worker.runtime.loading.plan import LoadPlan, check_room, make_plan
from rbee_worker.runtime.loading.reader import ReadState, WeightReader
from rbee_worker.runtime.loading.report import make_report
from rbee_worker.runtime.machine.devices import MIB, device_info, limit_threads, resolve_device, trim_host_memory
from rbee_worker.runtime.model.decoder import Batch, Transformer
from rbee_worker.runtime.model.linear.linear import choose_format
from rbee_worker.runtime.source import ModelSource, fetch, locate
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer

_EVENT_SECONDS = 0.5
_WARM_UP_TOKENS = 16

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
    def of(cls, plan: LoadPlan, transformer: Transformer, read: ReadState) -> Self:
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
        plan: of this model, where it was made already; see :func:`~rbee_worker.runtime.loading.plan.plan_local`.
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
        report = make_report(plan, config, transformer, timeline.phases, read.bytes_mapped)
        _check(cancel)
        asked.install(LoadedModel.of(plan, transformer, read))
    except Cancelled as cancelled:
        raise _CancelledWith(held) from cancelled
    yield timeline.event(Ready, report=report)


def _check(cancel: Cancellation) -> None:
    if cancel.is_set():
        raise Cancelled("The load was cancelled.")


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
