"""Worker: the bridge between asyncio and the threads that load and run models.

The engine's thread (``engine_thread.py``) owns the model that runs. Requests reach it as commands; each step's events
leave it with one wake-up of the event loop, however many sequences and tokens they belong to. A load (``loads.py``)
runs on a thread of its own and touches nothing but the model it is building, so that a resident model goes on serving;
the finished one takes over between two steps, when the jobs of the model before have ended.
"""

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Literal, get_args

from rbee_worker.config import EngineConfig, GenerationRequest
from rbee_worker.errors import ModelNotLoaded, Unavailable
from rbee_worker.events import LoadingToVram
from rbee_worker.runtime.engine.engine import JobEvents
from rbee_worker.runtime.engine.prepare import prepare
from rbee_worker.runtime.machine.devices import MIB, DeviceInfo, device_info, host_info
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer
from rbee_worker.worker.engine_thread import EngineThread
from rbee_worker.worker.job import Job, note_submitted
from rbee_worker.worker.jobs import Jobs
from rbee_worker.worker.loads import Loads

State = Literal["no_model", "loading", "ready", "draining", "failed"]
STATES: tuple[State, ...] = get_args(State)

_LONGEST_RETRY_AFTER = 60
_CANCEL_SECONDS = 10.0
"""How long cancelled jobs may take to end when draining; a step is far shorter."""


class Worker:
    """Loads models and runs jobs for an asynchronous server.

    Attributes:
        id: UUID of this worker.
        engine: the thread that runs the model.
        jobs: what was submitted and has not ended.
        loads: the loads and what is known of the latest.
    """

    def __init__(self, config: EngineConfig, *, max_queue: int = 64) -> None:
        self.id = str(uuid.uuid4())
        self._config = config
        self._started_at = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._draining = False
        self.jobs = Jobs(config.max_batch_size + max_queue)
        self.engine = EngineThread(config, emit=self._emit, changed=self._note_change, died=self._fail_jobs)
        self.loads = Loads(config, self.engine, self._on_loop, self._note_change)

    # -- life

    def start(self) -> None:
        """Start the engine's thread; call it on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new work, cancel a load, let running jobs finish within the grace, then cancel them."""
        self._draining = True
        self._wake()
        self.loads.close()
        await self.jobs.wait_until_none(grace_seconds)
        for job_id in self.jobs:
            self.cancel(job_id)
        await self.jobs.wait_until_none(_CANCEL_SECONDS)

    async def close(self) -> None:
        """Stop the engine's thread, which frees the model; jobs that still run end with an error."""
        self._draining = True
        self._wake()
        self.loads.close()
        await asyncio.to_thread(self.loads.join, _CANCEL_SECONDS)
        await asyncio.to_thread(self.engine.stop, _CANCEL_SECONDS)
        self.jobs.fail_all("The worker was closed.")

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
        self._refuse_when_not_serving()
        self.jobs.check_room(len(requests))
        model = self.engine.model
        sequences = [prepare(model, request, self._config) for request in requests]
        jobs = [Job(job.job_id, self.cancel, asked) for job, asked in zip(sequences, requests, strict=True)]
        self.jobs.register(jobs)
        note_submitted(jobs)
        self.engine.add(sequences, model)
        return jobs

    def cancel(self, job_id: str) -> None:
        """End a job; unknown and ended ones are ignored."""
        if job_id in self.jobs:
            self.engine.cancel(job_id)

    # -- state

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model that serves.

        Raises:
            ModelNotLoaded, Unavailable: there is none.
        """
        self._refuse_when_not_serving()
        model = self.engine.model
        if model is None:
            raise ModelNotLoaded("Model not loaded")
        return model.tokenizer

    @property
    def state(self) -> State:
        """One word for where the worker stands; a load beside a resident model leaves it ``ready``."""
        if self._draining:
            return "draining"
        if not self.engine.alive:
            return "failed"
        if self.engine.model is not None:
            return "ready"
        if self.loads.running:
            return "loading"
        return "failed" if self.loads.error is not None else "no_model"

    @property
    def serves(self) -> bool:
        """Whether a request would be taken now."""
        return self.state == "ready" and not self.engine.exclusive

    @property
    def changing(self) -> bool:
        """Whether requests are refused now and may be served in a moment: a load without a resident model, a swap."""
        coming = self.loads.running and self.engine.model is None
        return not self._draining and (self.engine.exclusive or coming)

    async def settled(self) -> None:
        """Return when :attr:`changing` no longer holds."""
        while self.changing:
            await self._changed.wait()

    @property
    def vram_bytes(self) -> int:
        """Bytes of weights on the devices: the resident model's and those of one being loaded."""
        resident, broadcast = self.engine.model, self.loads.broadcast
        total = resident.nbytes if resident is not None else 0
        # While a load reads headers, the broadcast is that of the load before.
        told = self.loads.running and broadcast is not None and not broadcast.ended
        counts = broadcast.latest_counts if broadcast is not None and told else None
        return total + (counts.vram_mb * MIB if counts is not None else 0)

    @property
    def uptime_seconds(self) -> float:
        """Seconds since the worker was made."""
        return time.monotonic() - self._started_at

    def memory(self) -> list[DeviceInfo]:
        """The memory of the host and of the device that the model runs on; asking others would take some of theirs."""
        model = self.engine.model
        return [*([device_info(model.device)] if model and model.device.type != "cpu" else ()), host_info()]

    def retry_after(self) -> int:
        """Seconds after which asking again makes sense: the load's estimate, 1 to 60."""
        event = self.loads.latest
        eta = event.eta_seconds if isinstance(event, LoadingToVram) else None
        return min(max(math.ceil(eta or 1), 1), _LONGEST_RETRY_AFTER)

    def _refuse_when_not_serving(self) -> None:
        state, error = self.state, self.loads.error
        if state == "draining":
            raise Unavailable("The worker is shutting down.", retry_after=_LONGEST_RETRY_AFTER)
        if state == "loading" or self.engine.exclusive:
            what = "is loading" if self.loads.running else "is being unloaded"
            raise Unavailable(f"The model {what}.", retry_after=self.retry_after())
        if state == "failed":
            reason = f": {error.message}" if error is not None else ""
            if not self.engine.alive:
                reason = ": the engine has died; restart the worker."
            raise ModelNotLoaded(f"Model not loaded{reason}", retry_after=_LONGEST_RETRY_AFTER)
        if state == "no_model":
            raise ModelNotLoaded("Model not loaded", retry_after=_LONGEST_RETRY_AFTER)

    # -- from other threads to the event loop

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        """Run a function on the event loop; a loop that has been closed has nobody left to tell."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call, *arguments)

    def _emit(self, events: JobEvents, running: int) -> None:
        """Give the events of a step to their jobs."""
        self._on_loop(self.jobs.deliver, events, running)

    def _fail_jobs(self) -> None:
        """End every job: the engine has died."""
        self._on_loop(self.jobs.fail_all, "The engine died.")

    def _note_change(self) -> None:
        """Wake those who wait for another state."""
        self._on_loop(self._wake)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
