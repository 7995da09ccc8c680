"""Loads: the worker's loads and unloads, one at a time. A load runs on a thread of its own and tells a broadcast."""

import contextlib
import contextvars
import functools
import logging
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import replace
from datetime import UTC, datetime

from rbee_worker.config import AS_CONFIGURED, DEFAULT_MODEL, EngineConfig, LoadSettings
from rbee_worker.errors import RbeeError, Unavailable
from rbee_worker.events import LoadFailed, LoadingEvent, Resolving
from rbee_worker.runtime.loading.load import failure_message, has_room, load_model, release_memory
from rbee_worker.runtime.loading.plan import plan_local
from rbee_worker.runtime.machine.devices import MIB
from rbee_worker.worker.broadcast import LoadingBroadcast
from rbee_worker.worker.claim import Claim
from rbee_worker.worker.engine_thread import EngineThread
from rbee_worker.worker.history import LoadHistory, PastLoad

logger = logging.getLogger(__name__)

Loading = Generator[LoadingEvent, None, None]
OnLoop = Callable[..., None]
"""Runs a function, with its arguments, on the event loop."""


class Loads:
    """Runs loads and unloads, and keeps what is known of the latest load.

    Args:
        config: of the worker; a load may change parts of it for itself.
        engine: takes the models.
        on_loop: runs what touches the broadcast.
        changed: called, on any thread, when a load or unload has begun or ended.

    Attributes:
        broadcast: the latest load's events; None before the first and after an unload.
        error: why the latest load failed; None after one that did not.
        outcomes: how many loads have ended with ``ready``, ``error`` and ``cancelled``.
        history: the last of them.
    """

    def __init__(
        self, config: EngineConfig, engine: EngineThread, on_loop: OnLoop, changed: Callable[[], None]
    ) -> None:
        self.broadcast: LoadingBroadcast | None = None
        self.error: RbeeError | None = None
        self.outcomes: Counter[str] = Counter()
        self.history = LoadHistory()
        self._config = config
        self._engine = engine
        self._on_loop = on_loop
        self._claim = Claim(changed)
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether a load is under way."""
        return self._claim.holder == "load"

    @property
    def latest(self) -> LoadingEvent | None:
        """The newest event of the latest load."""
        return self.broadcast.latest if self.broadcast is not None else None

    def progress(self) -> AsyncGenerator[LoadingEvent, None]:
        """The latest state of the load at once, then what follows, until its terminal event.

        Raises:
            Unavailable: there is no load to speak of.
        """
        if self.broadcast is None:
            raise Unavailable("No model was asked for, so nothing is loading.", retry_after=5)
        return self.broadcast.subscribe()

    def begin(
        self,
        model: str | None,
        settings: LoadSettings = AS_CONFIGURED,
    ) -> bool:
        """Begin to load a model; any thread may call this, and pays for reading headers when a model is resident.

        Returns:
            True when a resident model goes on serving until the new one is ready, or has failed to load. False when
            there is none, or when the two fit only one by one: it is then unloaded first, once its jobs have ended.

        Raises:
            Conflict: another load, or an unload, is under way.
            Unavailable: the worker is shutting down.
        """
        config = replace(self._config, **settings.given)
        cancel = self._claim.take("load")  # first, so that what is resident stays as it is found now
        before = self.broadcast, self.error
        try:
            resident = self._engine.model
            plan = plan_local(model, config) if resident is not None else None
            beside = plan is None or has_room(plan, config, resident)
            # A model that would not even fit in the resident one's place is no reason to give that up: its load fails.
            swaps = plan is not None and not beside and has_room(plan, config, resident, instead=True)
            keeps = resident is not None and not swaps
            make_room = functools.partial(self._engine.unload, cancel) if swaps else None
            install = functools.partial(self._engine.install, cancel=cancel)
            loading = load_model(model, config, cancel, install, plan=plan, make_room=make_room)
            logger.info("loading %s", model or DEFAULT_MODEL)
            self.error = None
            self.broadcast = broadcast = LoadingBroadcast()
            # The context carries the request's correlation id into the load's log lines.
            run = functools.partial(
                contextvars.copy_context().run, self._run, model or DEFAULT_MODEL, loading, broadcast
            )
            thread = threading.Thread(target=run, name="loader", daemon=True)
            thread.start()
            self._thread = thread
        except BaseException:  # memory has run out, or the system has no thread to give
            self.broadcast, self.error = before
            self._claim.release()
            raise
        return keeps

    def cancel(self) -> bool:
        """Ask the running load to end with ``cancelled``; False when there is none."""
        return self._claim.cancel_load()

    def unload(self) -> int:
        """Free the model once its running jobs have ended, and forget its load; returns the bytes of weights freed.

        Any thread but the event loop's may call this, and waits for the jobs.

        Raises:
            Conflict: a load, or another unload, is under way.
            InferenceError: the engine has died.
            Unavailable: the worker is shutting down.
        """
        self._claim.take("unload")
        try:
            freed = self._engine.unload()
            self.broadcast = self.error = None
        finally:
            self._claim.release()
        logger.info("unloaded: %d MiB of weights freed", freed // MIB)
        return freed

    def close(self) -> None:
        """Begin no load any more, and cancel the running one."""
        self._claim.close()

    def join(self, seconds: float) -> None:
        """Wait for the running load's thread, for a while."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, model: str, loading: Loading, broadcast: LoadingBroadcast) -> None:
        began = datetime.now(UTC)
        event: LoadingEvent = Resolving(seq=-1, elapsed_seconds=0.0, model="")
        try:
            for event in loading:
                if not event.terminal:
                    self._on_loop(broadcast.publish, event)
            end = event
        except BaseException as error:  # noqa: BLE001  (whatever it was, watchers get their terminal event)
            end = self._failed(error, event)
        # Told last: who sees the end finds the model in place, the error known, and the way free for another load.
        self.outcomes[end.stage] += 1
        if not isinstance(end, LoadFailed):
            logger.info("loading ended: %s after %.1f s", end.stage, end.elapsed_seconds)
        self._claim.release()
        self._on_loop(self.history.add, PastLoad(model, began, end))
        self._on_loop(broadcast.publish, end)

    def _failed(self, error: BaseException, last: LoadingEvent) -> LoadingEvent:
        """Note why the load failed; the event that says so."""
        if isinstance(error, RbeeError):
            logger.error("loading failed: %s", error)
            self.error = error
        else:
            logger.error("loading failed", exc_info=error)
            self.error = RbeeError(failure_message(error))
        # The frames of a traceback would keep what was loaded alive.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        with contextlib.suppress(RuntimeError):  # a device that has failed refuses this too
            release_memory()
        if isinstance(last, LoadFailed):
            return last
        number, elapsed = last.seq + 1, last.elapsed_seconds
        return LoadFailed(seq=number, elapsed_seconds=elapsed, code=self.error.code, message=str(self.error))
