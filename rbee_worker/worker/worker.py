"""Worker: the bridge between asyncio and the threads that load and run models.

The engine's thread (``engine_thread.py``) owns the model that runs. Requests reach it as commands; each step's events
leave it with one wake-up of the event loop, however many sequences and tokens they belong to. A load (``loads.py``)
runs on a thread of its own and touches nothing but the model it is building, so that a resident model goes on serving;
the finished one takes over between two steps, when the jobs of the model before have ended.
"""

import asyncio
import contextlib
import functools
import logging
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from typing import Literal, TypeVar, cast, get_args

from rbee_worker.config import DTypeName, EngineConfig, GenerationRequest, Quantization
from rbee_worker.errors import Conflict, ModelNotLoaded, RbeeError, Unavailable
from rbee_worker.events import InferenceFailed, LoadingEvent, LoadingToVram
from rbee_worker.runtime.engine.prepare import prepare
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.engine.stats import EngineStats
from rbee_worker.runtime.loading.load import LoadedModel, has_room, plan_local
from rbee_worker.runtime.machine.devices import MIB, DeviceInfo, device_info, host_info, list_devices
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer
from rbee_worker.worker.broadcast import LoadingBroadcast
from rbee_worker.worker.engine_thread import EngineThread
from rbee_worker.worker.job import Job, JobObserver, note_submitted
from rbee_worker.worker.jobs import Jobs
from rbee_worker.worker.loads import Loads

logger = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["no_model", "loading", "ready", "draining", "failed"]
STATES: tuple[State, ...] = get_args(State)

_LONGEST_RETRY_AFTER = 60
_LOAD_HINT = "Load one with POST /v1/loading, or start the worker with --model."
_POLL_SECONDS = 0.02
_CANCEL_SECONDS = 10.0
"""How long cancelled jobs may take to end when draining; a step is far shorter."""


class Worker:
    """Loads models and runs jobs for an asynchronous server.

    Attributes:
        id: UUID of this worker.
    """

    def __init__(self, config: EngineConfig, *, max_queue: int = 64) -> None:
        self.id = str(uuid.uuid4())
        self._config = config
        self._jobs = Jobs(config.max_batch_size, max_queue)
        self._thread = EngineThread(
            config,
            deliver=lambda events: self._call_on_loop(self._jobs.deliver, events),
            died=lambda: self._call_on_loop(self._jobs.fail_all, "The engine died."),
        )
        self._engine = self._thread.engine
        self._started_at = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._loads = Loads(self)
        self._busy_with: Literal["load", "unload"] | None = None
        self._draining = False

    # -- life

    def start(self) -> None:
        """Start the engine's thread; call it on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new work, cancel a load, let running jobs finish within the grace, then cancel them."""
        self._draining = True
        self._loads.cancel()
        await self._jobs.wait_until_none(grace_seconds)
        for job_id in self._jobs:
            self.cancel(job_id)
        await self._jobs.wait_until_none(_CANCEL_SECONDS)

    async def close(self) -> None:
        """Stop the engine's thread and free the model; jobs that still run end with an error."""
        self._draining = True
        self._loads.cancel()
        await asyncio.to_thread(self._loads.join, _CANCEL_SECONDS)
        await asyncio.to_thread(self._thread.stop, _CANCEL_SECONDS)
        self._jobs.fail_all("The worker was closed.")

    # -- loading

    def load(
        self,
        model: str | None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
    ) -> bool:
        """Begin to load a model; any thread may call this, and pays for reading headers when a model is resident.

        What is None is as the worker was configured.

        Returns:
            True when a resident model goes on serving until the new one is ready. False when there is none, or when
            the two do not fit together: it is then unloaded first, once its running jobs have ended.

        Raises:
            Conflict: another load, or an unload, is under way.
            Unavailable: the worker is draining.
        """
        config = replace(
            self._config,
            device=device or self._config.device,
            dtype=cast("DTypeName", dtype or self._config.dtype),
            quantize=cast("Quantization", quantize or self._config.quantize),
        )
        resident = self._engine.model is not None
        plan = plan_local(model, config) if resident else None
        keeps = resident and (plan is None or has_room(plan, config))
        with self._lock:
            self._claim("load")
            try:
                self._loads.begin(model, config, plan, unload_first=resident and not keeps)
            except BaseException:  # the system has no thread to give
                self._busy_with = None
                raise
        return keeps

    def cancel_load(self) -> bool:
        """Cancel the running load; False when there is none."""
        running = self.loading
        self._loads.cancel()
        return running

    async def unload(self) -> int:
        """Free the model once its running jobs have ended, and forget its load; returns the bytes of weights freed.

        Raises:
            Conflict: a load, or another unload, is under way.
            InferenceError: the engine has died.
        """
        with self._lock:
            self._claim("unload")
        try:
            freed = await asyncio.to_thread(self._thread.between_jobs, self._engine.unload)
            self._loads.forget()
            logger.info("unloaded: %d MiB of weights freed", freed // MIB)
        finally:
            self._busy_with = None
        return freed

    def progress(self) -> AsyncIterator[LoadingEvent]:
        """The latest state of the load at once, then what follows, until its terminal event.

        Raises:
            Unavailable: there is no load to speak of.
        """
        broadcast = self._loads.broadcast
        if broadcast is None:
            raise Unavailable("No model was asked for, so nothing is loading.", retry_after=5)
        return broadcast.subscribe()

    # -- jobs

    def submit(self, request: GenerationRequest) -> Job:
        """Queue a job; any thread may call this, and pays for the tokenizing.

        Raises:
            InvalidRequest, ContextTooLong: the request is wrong.
            Conflict: its job id runs already.
            QueueFull: as many jobs wait as may.
            Unavailable: loading or draining.
            ModelNotLoaded: there is no model and none is coming.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Iterable[GenerationRequest]) -> list[Job]:
        """Queue several jobs, all of them or none; else as :meth:`submit`."""
        requests = list(requests)
        self._check_serving()
        self._jobs.check_room(len(requests))
        model = self._engine.model
        sequences = [prepare(model, request, self._config) for request in requests]
        jobs = [Job(job.job_id, self.cancel, asked) for job, asked in zip(sequences, requests, strict=True)]
        self._jobs.register(jobs)
        note_submitted(jobs)
        self._thread.do(functools.partial(self._add, sequences, model))
        return jobs

    def cancel(self, job_id: str) -> None:
        """End a job; unknown and ended ones are ignored."""
        if job_id in self._jobs:
            # As a command, so that it cannot overtake the job it is about.
            self._thread.do(functools.partial(self._engine.cancel, job_id))

    # -- state

    @property
    def state(self) -> State:
        """One word for where the worker stands; a load beside a resident model leaves it ``ready``."""
        if self._draining:
            return "draining"
        if not self.engine_alive:
            return "failed"
        if self._engine.model is not None:
            return "ready"
        if self.loading:
            return "loading"
        return "failed" if self.load_error is not None else "no_model"

    @property
    def serves(self) -> bool:
        """Whether a request would be taken now."""
        return self.state == "ready" and not self._thread.exclusive

    @property
    def changing(self) -> bool:
        """Whether requests are refused now and may be served in a moment: a load without a resident model, a swap."""
        return not self._draining and (self._thread.exclusive or (self.loading and self._engine.model is None))

    async def settled(self) -> None:
        """Return when :attr:`changing` no longer holds."""
        while self.changing:  # noqa: ASYNC110  (it depends on the states of two threads)
            await asyncio.sleep(_POLL_SECONDS)

    @property
    def engine_alive(self) -> bool:
        """Whether the engine's thread lives."""
        return self._thread.alive

    @property
    def loading(self) -> bool:
        """Whether a load is running."""
        return self._busy_with == "load"

    @property
    def load_error(self) -> RbeeError | None:
        """Why the last load failed; None after one that did not."""
        return self._loads.error

    @property
    def load_outcomes(self) -> Counter[str]:
        """How many loads have ended with ``ready``, ``error`` and ``cancelled``."""
        return self._loads.outcomes

    @property
    def broadcast(self) -> LoadingBroadcast | None:
        """The latest load; None before the first and after :meth:`unload`."""
        return self._loads.broadcast

    @property
    def observers(self) -> list[JobObserver]:
        """Told of the jobs as their events arrive; more may be added."""
        return self._jobs.observers

    @property
    def capacity(self) -> int:
        """Jobs that can run and wait at a time."""
        return self._jobs.capacity

    @property
    def running(self) -> int:
        """Jobs with a place in the batch."""
        return self._jobs.running

    @property
    def queued(self) -> int:
        """Jobs waiting for one."""
        return self._jobs.queued

    @property
    def vram_bytes(self) -> int:
        """Bytes of weights on the devices: the resident model's and those of one being loaded."""
        resident = self._engine.model
        total = resident.nbytes if resident is not None else 0
        counts = self.broadcast.latest_counts if self.broadcast is not None and self.loading else None
        return total + (counts.vram_mb * MIB if counts is not None else 0)

    @property
    def model_name(self) -> str | None:
        """Name of the model that serves."""
        model = self._engine.model
        return model.name if model is not None else None

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and output together at most, of the model that serves."""
        model = self._engine.model
        return model.context_length if model is not None else None

    @property
    def uptime_seconds(self) -> float:
        """Seconds since the worker was made."""
        return time.monotonic() - self._started_at

    @property
    def last_loading_event(self) -> LoadingEvent | None:
        """The latest event of the latest load."""
        return self.broadcast.latest if self.broadcast is not None else None

    @property
    def watchers(self) -> int:
        """Subscribers of the latest load."""
        return self.broadcast.subscribers if self.broadcast is not None else 0

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model that serves.

        Raises:
            ModelNotLoaded, Unavailable: there is none.
        """
        self._check_serving()
        model = self._engine.model
        if model is None:
            raise ModelNotLoaded("Model not loaded")
        return model.tokenizer

    def devices(self) -> list[DeviceInfo]:
        """The machine's devices and their memory."""
        return list_devices()

    def engine_stats(self) -> EngineStats:
        """What the engine has done and holds."""
        return self._engine.stats

    def memory(self) -> list[DeviceInfo]:
        """The memory of the host and of the device that the model runs on; asking others would take some of theirs."""
        model = self._engine.model
        return [*([device_info(model.device)] if model and model.device.type != "cpu" else ()), host_info()]

    def retry_after(self) -> int:
        """Seconds after which asking again makes sense: the load's estimate, 1 to 60."""
        event = self.last_loading_event
        eta = event.eta_seconds if isinstance(event, LoadingToVram) else None
        return min(max(math.ceil(eta or 1), 1), _LONGEST_RETRY_AFTER)

    # -- on any thread

    def _check_serving(self) -> None:
        state = self.state
        if state == "draining":
            raise Unavailable("The worker is shutting down.", retry_after=_LONGEST_RETRY_AFTER)
        if state == "loading" or self._thread.exclusive:
            what = "is loading" if self.loading else "is being unloaded"
            raise Unavailable(f"The model {what}.", retry_after=self.retry_after())
        if state == "failed":
            reason = f": {self.load_error.message}" if self.load_error is not None else ""
            if not self.engine_alive:
                reason = ": the engine has died; restart the worker."
            raise ModelNotLoaded(f"Model not loaded{reason}", hint=_LOAD_HINT, retry_after=_LONGEST_RETRY_AFTER)
        if state == "no_model":
            raise ModelNotLoaded("Model not loaded", hint=_LOAD_HINT, retry_after=_LONGEST_RETRY_AFTER)

    def _claim(self, operation: Literal["load", "unload"]) -> None:
        """Take the one place there is for a load or an unload; under the lock."""
        if self._draining:
            raise Unavailable("The worker is shutting down.", retry_after=_LONGEST_RETRY_AFTER)
        if self._busy_with == "load":
            raise Conflict("A load is running.", hint="Wait for it, or cancel it with DELETE /v1/loading.")
        if self._busy_with is not None:
            raise Conflict("The model is being unloaded.", hint="Ask again in a moment.")
        self._busy_with = operation

    def _call_on_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        """Run a callback on the event loop; a loop that has been closed has nobody left to tell."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(callback, *arguments)

    # -- on the loader's thread

    def publish(self, broadcast: LoadingBroadcast, event: LoadingEvent) -> None:
        """Tell an event of a load."""
        self._call_on_loop(broadcast.publish, event)

    def make_room(self, cancel: threading.Event) -> None:
        """Unload the resident model once its jobs have ended; Cancelled when ``cancel`` is set before."""
        self._thread.between_jobs(self._engine.unload, cancel)

    def take_over(self, model: LoadedModel, cancel: threading.Event) -> None:
        """Make ``model`` the one that serves once no job is left; Cancelled when ``cancel`` is set before."""
        self._thread.between_jobs(functools.partial(self._engine.install, model), cancel)

    def load_has_ended(self) -> None:
        """Let another load begin."""
        self._busy_with = None

    # -- on the engine's thread

    def _add(self, sequences: list[Sequence], model: LoadedModel | None) -> None:
        for sequence in sequences:
            if model is self._engine.model:
                self._engine.add(sequence)
            else:
                failure = InferenceFailed(code=Unavailable.code, message="The model was replaced; ask again.")
                self._call_on_loop(self._jobs.deliver, [(sequence.job_id, failure)])
