"""Worker: the one thread that runs an Engine, and the bridge between it and asyncio.

The engine's thread owns the model that runs. Requests reach it as commands; each step's events leave it with one
wake-up of the event loop, however many sequences and tokens they belong to. A load runs on a thread of its own and
touches nothing but the model it is building, so that a resident model goes on serving; the finished model is handed
to the engine's thread, which puts it in place between two steps when the jobs of the model before have ended.
"""

import asyncio
import contextlib
import contextvars
import functools
import logging
import math
import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal, TypeVar, cast, get_args

from rbee_worker.broadcast import LoadingBroadcast
from rbee_worker.config import DTypeName, EngineConfig, GenerationRequest
from rbee_worker.errors import Conflict, InferenceError, ModelNotLoaded, QueueFull, RbeeError, Unavailable
from rbee_worker.events import InferenceFailed, LoadingEvent, LoadingToVram
from rbee_worker.job import Job
from rbee_worker.runtime.engine import Engine, JobEvents, prepare
from rbee_worker.runtime.loading import load_model
from rbee_worker.runtime.memory import MIB, DeviceInfo, list_devices
from rbee_worker.runtime.sequence import Sequence
from rbee_worker.runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["no_model", "loading", "ready", "draining", "failed"]
STATES: tuple[State, ...] = get_args(State)

_LONGEST_RETRY_AFTER = 60
_POLL_SECONDS = 0.02
_CANCEL_SECONDS = 10.0
"""How long cancelled jobs may take to end when draining; a step is far shorter."""


class Worker:
    """Loads models and runs jobs for an asynchronous server.

    Attributes:
        id: UUID of this worker.
        load_error: why the last load failed; None after one that did not.
        load_outcomes: how many loads have ended with ``ready``, ``error`` and ``cancelled``.
        broadcast: the latest load; None before the first and after :meth:`unload`.
    """

    def __init__(self, config: EngineConfig, *, max_queue: int = 64) -> None:
        self.id = str(uuid.uuid4())
        self.load_error: RbeeError | None = None
        self.load_outcomes: Counter[str] = Counter()
        self.broadcast: LoadingBroadcast | None = None
        self._config = config
        self._max_queue = max_queue
        self._engine = Engine(config)
        self._started_at = time.monotonic()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._when_idle: list[Callable[[], None]] = []
        self._loader: threading.Thread | None = None
        self._is_loading = False
        self._cancel_load = threading.Event()
        self._draining = False
        self._changing = False
        self._stopping = threading.Event()

    # -- life

    def start(self) -> None:
        """Start the engine's thread; call it on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new work, cancel a load, let running jobs finish within the grace, then cancel them."""
        self._draining = True
        self.cancel_load()
        await self._wait_for_jobs(grace_seconds)
        for job_id in list(self._jobs):
            self.cancel(job_id)
        await self._wait_for_jobs(_CANCEL_SECONDS)

    async def close(self) -> None:
        """Stop the engine's thread and free the model."""
        self._draining = True
        self.cancel_load()
        if self._loader is not None:
            await asyncio.to_thread(self._loader.join, _CANCEL_SECONDS)
        self._stopping.set()
        self._commands.put(lambda: None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, _CANCEL_SECONDS)
        self._engine.unload()

    # -- loading

    def load(self, model: str | None, *, device: str | None = None, dtype: str | None = None) -> bool:
        """Begin to load a model; any thread may call this.

        Returns:
            True when a resident model goes on serving meanwhile.

        Raises:
            Conflict: another load runs.
            Unavailable: the worker is draining.
        """
        with self._lock:
            if self._draining:
                raise Unavailable("The worker is shutting down.", retry_after=_LONGEST_RETRY_AFTER)
            if self.loading:
                raise Conflict("Another load is running.", hint="Wait for it, or cancel it with DELETE /v1/loading.")
            config = replace(
                self._config,
                device=device or self._config.device,
                dtype=cast("DTypeName", dtype or self._config.dtype),
            )
            self.load_error = None
            self._cancel_load = threading.Event()
            self.broadcast = LoadingBroadcast()
            arguments = (model, config, self._cancel_load, self.broadcast)
            # The context carries the request's correlation id into the load's log lines.
            run = functools.partial(contextvars.copy_context().run, self._load, *arguments)
            self._loader = threading.Thread(target=run, name="loader", daemon=True)
            resident = self._engine.model is not None
            self._is_loading = True
            self._loader.start()
        return resident

    def cancel_load(self) -> bool:
        """Cancel the running load; False when there is none."""
        running = self.loading
        self._cancel_load.set()
        return running

    async def unload(self) -> int:
        """Free the model once its running jobs have ended, and forget the load that brought it.

        Returns:
            Bytes of weights freed.

        Raises:
            Conflict: a load runs.
            InferenceError: the engine has died.
        """
        if self.loading:
            raise Conflict("A load is running.", hint="Wait for it, or cancel it with DELETE /v1/loading.")
        freed = await asyncio.to_thread(self._when_jobs_have_ended, self._engine.unload)
        self.load_error = self.broadcast = None
        return freed

    def progress(self) -> AsyncIterator[LoadingEvent]:
        """The latest state of the load at once, then what follows, until its terminal event.

        Raises:
            Unavailable: no load was ever asked for.
        """
        if self.broadcast is None:
            raise Unavailable("No model was asked for, so nothing is loading.", retry_after=5)
        return self.broadcast.subscribe()

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
        self._check_serving()
        sequence = prepare(self._engine.model, request)
        with self._lock:
            if sequence.job_id in self._jobs:
                raise Conflict(f"Job {sequence.job_id} is running already.")
            if self.queued >= self._max_queue and len(self._jobs) >= self._config.max_batch_size:
                raise QueueFull(f"The queue is full: {self.queued} of {self._max_queue}.", retry_after=1)
            job = self._jobs[sequence.job_id] = Job(sequence.job_id, self.cancel)
        self._commands.put(functools.partial(self._add, sequence))
        return job

    def cancel(self, job_id: str) -> None:
        """End a job; unknown and ended ones are ignored."""
        # As a command, so that it cannot overtake the job it is about.
        self._commands.put(functools.partial(self._engine.cancel, job_id))

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
    def engine_alive(self) -> bool:
        """Whether the engine's thread lives."""
        return self._thread.is_alive()

    @property
    def loading(self) -> bool:
        """Whether a load is running."""
        return self._is_loading

    @property
    def changing(self) -> bool:
        """Whether requests are refused now and may be served in a moment: a load without a resident model, a swap."""
        return not self._draining and (self._changing or (self.loading and self._engine.model is None))

    async def settled(self) -> None:
        """Return when :attr:`changing` no longer holds."""
        while self.changing:  # noqa: ASYNC110  (it depends on the states of two threads)
            await asyncio.sleep(_POLL_SECONDS)

    @property
    def running(self) -> int:
        """Jobs with a place in the batch."""
        return min(len(self._jobs), self._config.max_batch_size)

    @property
    def queued(self) -> int:
        """Jobs waiting for one."""
        return len(self._jobs) - self.running

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
        return self._engine.model.name if self._engine.model is not None else None

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and output together at most, of the model that serves."""
        return self._engine.model.context_length if self._engine.model is not None else None

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

    def retry_after(self) -> int:
        """Seconds after which asking again makes sense: the load's estimate, 1 to 60."""
        event = self.last_loading_event
        eta = event.eta_seconds if isinstance(event, LoadingToVram) else None
        return min(max(math.ceil(eta or 1), 1), _LONGEST_RETRY_AFTER)

    async def _wait_for_jobs(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._no_jobs(), seconds)

    async def _no_jobs(self) -> None:
        # Polled, since jobs are registered on any thread and asyncio's events are not thread-safe.
        while self._jobs:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_SECONDS)

    # -- on any thread

    def _check_serving(self) -> None:
        state = self.state
        if state == "draining":
            raise Unavailable("The worker is shutting down.", retry_after=_LONGEST_RETRY_AFTER)
        if state == "loading" or self._changing:
            what = "is loading" if self.loading else "is being unloaded"
            raise Unavailable(f"The model {what}.", retry_after=self.retry_after())
        if state == "failed":
            reason = f": {self.load_error.message}" if self.load_error is not None else ""
            raise ModelNotLoaded(f"Model not loaded{reason}", retry_after=_LONGEST_RETRY_AFTER)
        if state == "no_model":
            raise ModelNotLoaded("Model not loaded", retry_after=_LONGEST_RETRY_AFTER)

    def _call_on_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        """Run a callback on the event loop; a loop that has been closed has nobody left to tell."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(callback, *arguments)

    # -- on the event loop

    def _deliver(self, events: JobEvents) -> None:
        for job_id, event in events:
            job = self._jobs.get(job_id)
            if job is None:
                continue
            job.deliver(event)
            if event.terminal:
                with self._lock:
                    del self._jobs[job_id]

    # -- on the loader's thread

    def _load(
        self, model: str | None, config: EngineConfig, cancel: threading.Event, broadcast: LoadingBroadcast
    ) -> None:
        loading = load_model(model, config, cancel)
        end: LoadingEvent | None = None
        try:
            while True:
                event = next(loading)
                if event.terminal:
                    end = event
                else:
                    self._call_on_loop(broadcast.publish, event)
        except StopIteration as stop:
            if stop.value is not None:
                self._when_jobs_have_ended(functools.partial(self._engine.install, stop.value))
        except RbeeError as error:
            self.load_error = error
            logger.error("loading failed: %s", error)  # noqa: TRY400  (an expected failure needs no traceback)
        except Exception as error:
            self.load_error = RbeeError(f"Loading failed: {error}")
            logger.exception("loading failed")
        # Told last: who sees the end finds the model in place, the error known, and the way free for another load.
        self._is_loading = False
        if end is not None:
            self.load_outcomes[end.stage] += 1
            self._call_on_loop(broadcast.publish, end)

    def _when_jobs_have_ended(self, action: Callable[[], T]) -> T:
        """Have the engine's thread run ``action`` between two steps, once no job is left, and wait for its result.

        New jobs are refused meanwhile.
        """
        result: Future[T] = Future()

        def act() -> None:
            try:
                result.set_result(action())
            except Exception as error:  # noqa: BLE001  (whoever waits for the result gets it)
                result.set_exception(error)

        self._changing = True
        try:
            self._commands.put(functools.partial(self._when_idle.append, act))
            while True:
                with contextlib.suppress(TimeoutError):
                    return result.result(timeout=_POLL_SECONDS)
                if not self.engine_alive:
                    raise InferenceError("The engine has died; restart the worker.")
        finally:
            self._changing = False

    # -- on the engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._run_command(wait=not self._engine.has_work)
                if events := self._engine.step():
                    self._call_on_loop(self._deliver, events)
                self._run_idle_commands()
        except Exception:
            logger.exception("the engine died")
            self._call_on_loop(self._fail_all, "The engine died.")

    def _run_command(self, *, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            self._commands.get(block=wait)()

    def _run_idle_commands(self) -> None:
        while self._when_idle and not self._engine.has_work:
            self._when_idle.pop(0)()

    def _add(self, sequence: Sequence) -> None:
        if self._engine.model is None:
            failure = InferenceFailed(code=InferenceError.code, message="Model not loaded")
            self._call_on_loop(self._deliver, [(sequence.job_id, failure)])
            return
        self._engine.add(sequence)

    def _fail_all(self, message: str) -> None:
        failure = InferenceFailed(code=InferenceError.code, message=message)
        self._deliver([(job_id, failure) for job_id in list(self._jobs)])
