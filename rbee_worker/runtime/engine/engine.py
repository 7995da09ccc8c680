"""Engine: a model, the sequences that run on it, and the step that moves them all.

Not thread-safe: one thread loads, submits and steps. Only :meth:`Engine.cancel` may be called from another thread.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from operator import eq

from torch import Tensor

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig, GenerationRequest
from rbee_worker.errors import Conflict, DeadlineExceeded, InferenceError, ModelNotLoaded
from rbee_worker.escape import reason
from rbee_worker.events import InferenceEvent, LoadingEvent
from rbee_worker.panics import panics_as_errors
from rbee_worker.runtime.cache.block_pool import BLOCK_TOKENS, PoolUse
from rbee_worker.runtime.cache.kv_cache import SequenceCache
from rbee_worker.runtime.engine.decide import LogitsRow, decide
from rbee_worker.runtime.engine.prepare import prepare
from rbee_worker.runtime.engine.sampler import check_logits, likelihoods
from rbee_worker.runtime.engine.scheduler import Scheduled, Scheduler
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.engine.stats import EngineStats
from rbee_worker.runtime.loading.load import LoadedModel, load_model, release_memory
from rbee_worker.runtime.model.decoder import Batch

logger = logging.getLogger(__name__)

JobEvents = list[tuple[str, InferenceEvent]]
"""Emitted events in order, each with the id of its job."""


@dataclass(slots=True)
class _Counts:
    """What the engine counts itself; see :class:`EngineStats`."""

    steps: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0


class Engine:
    """Loads a model and generates text.

    Attributes:
        config: device, dtype, context and batch limits.
        model: the loaded model; None before the first load and after :meth:`unload`.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.model: LoadedModel | None = None
        self._scheduler = Scheduler(
            self.config.max_batch_size, self.config.prefill_chunk, prefix_cache=self.config.prefix_cache
        )
        self._sequences: dict[str, Sequence] = {}
        self._emitted: JobEvents = []
        self._counts = _Counts()
        self._batch_sizes: list[int] = []

    def load(self, model: str | None, cancel: Cancellation | None = None) -> Iterator[LoadingEvent]:
        """Load a model and make it the one that runs; see :func:`rbee_worker.runtime.loading.load.load_model`.

        The model before it is replaced when the new one is ready. It stays when the load fails or is cancelled.

        Raises:
            Conflict: at the call, while jobs run.
            RbeeError: after the terminal ``error`` event.
        """
        self._refuse_while_busy()
        return load_model(model, self.config, cancel or Cancellation(), self.install)

    def install(self, model: LoadedModel) -> None:
        """Make a loaded model the one that runs.

        Raises:
            Conflict: jobs still run on the one before.
        """
        self._refuse_while_busy()
        self.model = model

    def unload(self) -> int:
        """Drop the model. Jobs that still run on it end with an ``error`` event.

        Returns:
            Bytes of weights freed.
        """
        for sequence in self._sequences.values():
            self._emit(sequence, [sequence.fail(InferenceError.code, "The model was unloaded.")])
        self._retire()
        model, self.model = self.model, None
        if model is None:
            return 0
        freed = model.nbytes
        del model
        release_memory()
        return freed

    def generate(self, request: GenerationRequest) -> Iterator[InferenceEvent]:
        """Run one job to its end. Closing the iterator cancels it. Several iterators may be read in turn.

        Raises:
            InvalidRequest: no prompt, or the chat template refuses the messages; at the call.
            ContextTooLong: the prompt leaves no room for a token; at the call.
            ModelNotLoaded: there is no model; at the call.
            Conflict: the job id runs already; at the first event.
        """
        return self._run_to_end(prepare(self.model, request, self.config))

    def submit(self, request: GenerationRequest) -> Sequence:
        """Queue a job for :meth:`step`.

        Raises:
            InvalidRequest, ContextTooLong, ModelNotLoaded: as :meth:`generate`.
            Conflict: the job id runs already.
        """
        sequence = prepare(self.model, request, self.config)
        self.add(sequence)
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence prepared for the model that runs.

        Raises:
            Conflict: its job id runs already.
        """
        if sequence.job_id in self._sequences:
            raise Conflict(f"Job {sequence.job_id} is running already.")
        self._sequences[sequence.job_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, job_id: str) -> None:
        """End a job at the next step. Unknown and finished jobs are ignored. Any thread may call this."""
        sequence = self._sequences.get(job_id)
        if sequence is not None:
            sequence.cancelled = True

    @property
    def running(self) -> int:
        """Sequences that have a place in the batch."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return bool(self._sequences or self._emitted)

    @property
    def stats(self) -> EngineStats:
        """What was done and what is held. Any thread may read it."""
        model = self.model
        pool = model.transformer.cache.pool if model is not None else None
        use = pool.use if pool is not None else PoolUse(0, 0, 0)
        return EngineStats(
            **asdict(self._counts),
            batch_sizes=tuple(self._batch_sizes),
            preemptions=self._scheduler.preemptions,
            kv_blocks_total=pool.blocks if pool is not None else 0,
            kv_blocks_used=use.used,
            kv_blocks_cached=use.cached,
            block_tokens=BLOCK_TOKENS,
        )

    def step(self) -> JobEvents:
        """Move the running sequences: admit, one forward pass, sample, and emit.

        A failing forward pass ends every running sequence with an ``error`` event; a failing admission or sampler
        ends its own. The engine goes on.
        """
        self._move()
        return self._take()

    def admit(self) -> JobEvents:
        """What :meth:`step` begins with, alone: end what was cancelled, give places, and emit.

        So that ``started`` does not wait for the forward pass, which may take long.
        """
        self._begin()
        self._retire()
        return self._take()

    def _move(self) -> None:
        self._begin()
        try:
            with panics_as_errors(), self.model.transformer.threads() if self.model else contextlib.nullcontext():
                self._run()
        except Exception as error:  # noqa: BLE001  (whatever a pass raises fails its jobs, not the worker)
            self._fail(error, self._scheduler.running)
        self._retire()

    def _begin(self) -> None:
        for sequence in self._scheduler.take_ended(time.monotonic()):
            self._emit(sequence, _end(sequence))
        if self.model is None:
            self._fail(ModelNotLoaded("Model not loaded"), self._sequences.values())
        else:
            self._admit(self.model)

    def _emit(self, sequence: Sequence, events: Iterable[InferenceEvent]) -> None:
        self._emitted.extend((sequence.job_id, event) for event in events)

    def _take(self, job_id: str | None = None) -> JobEvents:
        """Remove and return what was emitted: all of it, or one job's part."""
        emitted, self._emitted = self._emitted, []
        if job_id is None:
            return emitted
        self._emitted = [item for item in emitted if item[0] != job_id]
        return [item for item in emitted if item[0] == job_id]

    def _refuse_while_busy(self) -> None:
        if self._sequences:
            raise Conflict(f"{len(self._sequences)} jobs still run on the model before.")

    def _admit(self, model: LoadedModel) -> None:
        pool = model.transformer.cache.pool
        tried: list[Sequence] = []

        def new_cache(sequence: Sequence) -> SequenceCache:
            tried[:] = [sequence]
            # The last token is always computed: its logits give the next one.
            prefix = sequence.tokens[:-1] if sequence.shares_prefix else ()
            rotation = model.transformer.rotation_for(len(sequence.tokens))
            return SequenceCache(pool, prefix, headroom=sequence.tokens_left, rotation=rotation)

        try:
            with panics_as_errors():
                for sequence, cache in self._scheduler.admit(new_cache):
                    self._emit(sequence, sequence.admit(model.name, cache))
                    self._counts.prefix_query_tokens += len(sequence.tokens) if self.config.prefix_cache else 0
                    self._counts.prefix_hit_tokens += cache.reused
        except Exception as error:  # noqa: BLE001  (those that have their places go on)
            self._fail(error, tried)

    def _run(self) -> None:
        """One forward pass over every running sequence's share, and a token for each whose prompt is computed."""
        shares = self._scheduler.schedule()
        if not shares or self.model is None:
            return
        transformer = self.model.transformer
        outputs = [
            share.sequence.prompt_outputs(share.count) if share.count > 1 else 1 + len(share.drafts) for share in shares
        ]
        batch = Batch.of(map(_passed, shares, outputs), transformer.device)
        logits = transformer.forward(batch)
        self._count(shares)
        ready: list[LogitsRow] = []
        row = 0
        for share, count in zip(shares, outputs, strict=True):
            sequence = share.sequence
            self._emit(sequence, _advance(share, logits[row : row + count]))
            if not sequence.pending:
                ready.append(LogitsRow(sequence, row + count - 1 - len(share.drafts), share.drafts))
            row += count
        lengths = [len(place.sequence.tokens) for place in ready]
        self._emitted.extend(decide(logits, ready))
        for place, length in zip(ready, lengths, strict=True):
            self._count_tokens(place.drafts, place.sequence.tokens[length:])

    def _count(self, shares: list[Scheduled]) -> None:
        counts = self._counts
        counts.steps += 1
        for share in shares:
            of_prompt = share.sequence.prompt_tokens - share.sequence.computed
            counts.prefilled_tokens += min(share.count, max(of_prompt, 0))
        self._batch_sizes.extend([0] * (len(shares) + 1 - len(self._batch_sizes)))
        self._batch_sizes[len(shares)] += 1

    def _count_tokens(self, drafts: tuple[int, ...], new: list[int]) -> None:
        """Count the tokens that a sequence got in this step, and its drafts."""
        self._counts.generated_tokens += len(new)
        self._counts.drafted_tokens += len(drafts)
        self._counts.accepted_tokens += sum(1 for _ in takewhile(bool, map(eq, drafts, new)))

    def _fail(self, error: Exception, sequences: Iterable[Sequence]) -> None:
        failed = [sequence for sequence in sequences if not sequence.finished]
        if failed and not isinstance(error, InferenceError):
            logger.error("a step failed", exc_info=error)
        message = str(error) if isinstance(error, InferenceError) else f"A step failed: {reason(error)}"
        for sequence in failed:
            self._emit(sequence, [sequence.fail(InferenceError.code, message)])

    def _retire(self) -> None:
        for sequence in [sequence for sequence in self._sequences.values() if sequence.finished]:
            self._scheduler.remove(sequence)
            del self._sequences[sequence.job_id]

    def _run_to_end(self, sequence: Sequence) -> Iterator[InferenceEvent]:
        self.add(sequence)
        try:
            while True:
                for _, event in self._take(sequence.job_id):
                    yield event
                    if event.terminal:
                        return
                self._move()
        finally:
            if not sequence.finished:
                sequence.cancelled = True
                self._move()
            self._take(sequence.job_id)


def _passed(share: Scheduled, outputs: int) -> tuple[SequenceCache, list[int], int]:
    """A share as :meth:`Batch.of` takes it."""
    tokens, begin = share.sequence.tokens, share.cache.length
    return share.cache, [*tokens[begin : begin + share.count], *share.drafts], outputs


def _advance(share: Scheduled, logits: Tensor) -> Iterator[InferenceEvent]:
    """Count a share as computed, and emit what its logits say about the prompt."""
    sequence = share.sequence
    targets = sequence.prompt_targets(share.count)
    of_prompt = sequence.computed < sequence.prompt_tokens
    share.cache.advance(sequence.tokens, share.cache.length + share.count)
    if not of_prompt:
        return
    yield from sequence.progress()
    told = []
    if targets:
        wanted = sequence.params.prompt_logprobs or 0
        try:
            check_logits(logits[: len(targets)])
        except InferenceError as error:  # its own fault: the others of the batch go on
            yield sequence.fail(error.code, str(error))
            return
        told = likelihoods(logits[: len(targets)].log_softmax(-1), targets, [wanted] * len(targets))
    yield from sequence.take_prompt_likelihoods(told)


def _end(sequence: Sequence) -> Iterator[InferenceEvent]:
    """The end of a sequence that was cancelled, or whose deadline has passed."""
    if sequence.cancelled:
        yield from sequence.cancel()
    else:
        yield sequence.fail(DeadlineExceeded.code, "The job took longer than its timeout.")
