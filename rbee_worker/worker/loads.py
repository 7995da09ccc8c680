"""Loads: the worker's loads and unloads, one at a time. A load runs on a thread of its own and tells a broadcast."""

import contextlib
import contextvars
import functools
import logging
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Literal

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import DEFAULT_MODEL, EngineConfig
from rbee_worker.errors import Conflict, RbeeError, Unavailable
from rbee_worker.events import LoadFailed, LoadingEvent, Resolving
from rbee_worker.runtime.loading.load import LoadPlan, failure_message, load_model, release_memory
from rbee_worker.worker.broadcast import LoadingBroadcast
from rbee_worker.worker.engine_thread import EngineThread

logger = logging.getLogger(__name__)

Loading = Generator[LoadingEvent, None, None]
OnLoop = Callable[..., None]
"""Runs a function, with its arguments, on the event loop."""


class Loads:
    """Runs loads and unloads, and keeps what is known of the latest load.

    Args:
        engine: takes the models.
        on_loop: runs what touches the broadcast.
        changed: called, on any thread, when a load or unload has begun or ended.

    Attributes:
        broadcast: the latest load's events; None before the first and after an unload.
        error: why the latest load failed; None after one that did not.
        outcomes: how many loads have ended with ``ready``, ``error`` and ``cancelled``.
    """

    def __init__(self, engine: EngineThread, on_loop: OnLoop, changed: Callable[[], None]) -> None:
        self.broadcast: LoadingBroadcast | None = None
        self.error: RbeeError | None = None
        self.outcomes: Counter[str] = Counter()
        self._engine = engine
        self._on_loop = on_loop
        self._changed = changed
        self._cancel = Cancellation()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._busy_with: Literal["load", "unload"] | None = None

    @property
    def running(self) -> bool:
        """Whether a load is under way."""
        return self._busy_with == "load"

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

    def begin(self, model: str | None, config: EngineConfig, plan: LoadPlan | None, *, unload_first: bool) -> None:
        """Start a load.

        Args:
            model: what MODEL means on the command line.
            config: where and how it is to run.
            plan: of it, where there is one already.
            unload_first: have the resident model unloaded before the new one takes memory.

        Raises:
            Conflict: another load, or an unload, is under way.
        """
        cancel, broadcast = Cancellation(), LoadingBroadcast()
        self._claim("load", cancel)
        try:
            self.error = None
            logger.info("loading %s", model or DEFAULT_MODEL)
            make_room = functools.partial(self._engine.unload, cancel) if unload_first else None
            install = functools.partial(self._engine.install, cancel=cancel)
            loading = load_model(model, config, cancel, install, plan=plan, make_room=make_room)
            # The context carries the request's correlation id into the load's log lines.
            run = functools.partial(contextvars.copy_context().run, self._run, loading, broadcast)
            thread = threading.Thread(target=run, name="loader", daemon=True)
            before, self.broadcast = self.broadcast, broadcast
            try:
                thread.start()
            except BaseException:
                self.broadcast = before
                raise
            self._thread = thread
        except BaseException:  # the system has no thread to give
            self._release()
            raise

    def cancel(self) -> bool:
        """Ask the running load to end with ``cancelled``; False when there is none."""
        running = self.running
        self._cancel.set()
        return running

    def unload(self) -> int:
        """Free the model once its jobs have ended, and forget its load; returns the bytes of weights freed.

        Raises:
            Conflict: a load, or another unload, is under way.
            InferenceError: the engine has died.
        """
        self._claim("unload")
        try:
            freed = self._engine.unload()
            self.broadcast = self.error = None
            return freed
        finally:
            self._release()

    def join(self, seconds: float) -> None:
        """Wait for the running load's thread, for a while."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _claim(self, operation: Literal["load", "unload"], cancel: Cancellation | None = None) -> None:
        """Take the one place there is for a load or an unload; ``cancel`` is what :meth:`cancel` sets from then on."""
        with self._lock:
            if self._busy_with == "load":
                raise Conflict("A load is running.", hint="Wait for it, or cancel it.")
            if self._busy_with is not None:
                raise Conflict("The model is being unloaded.", hint="Ask again in a moment.")
            self._busy_with = operation
            self._cancel = cancel or self._cancel
        self._changed()

    def _release(self) -> None:
        self._busy_with = None
        self._changed()

    def _run(self, loading: Loading, broadcast: LoadingBroadcast) -> None:
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
        self._release()
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
