"""Loads: the worker's loads, one at a time, each on a thread of its own, told through a broadcast."""

import contextlib
import contextvars
import functools
import logging
import threading
from collections import Counter
from collections.abc import Generator
from typing import Protocol

from rbee_worker.config import DEFAULT_MODEL, EngineConfig
from rbee_worker.errors import RbeeError
from rbee_worker.events import LoadFailed, LoadingEvent, Resolving
from rbee_worker.runtime.loading.load import LoadedModel, LoadPlan, failure_message, load_model, release_memory
from rbee_worker.worker.broadcast import LoadingBroadcast

logger = logging.getLogger(__name__)

Loading = Generator[LoadingEvent, None, None]


class Host(Protocol):
    """What a load asks of its worker."""

    def publish(self, broadcast: LoadingBroadcast, event: LoadingEvent) -> None:
        """Tell an event, on the event loop."""
        ...

    def make_room(self, cancel: threading.Event) -> None:
        """Unload the resident model once its jobs have ended.

        Raises:
            Cancelled: ``cancel`` was set before that.
        """
        ...

    def take_over(self, model: LoadedModel, cancel: threading.Event) -> None:
        """Make a loaded model the one that serves, once the jobs of the one before have ended.

        Raises:
            Cancelled: ``cancel`` was set before that.
        """
        ...

    def load_has_ended(self) -> None:
        """Let another load begin."""
        ...


class Loads:
    """Runs loads and keeps what is known of the latest.

    Attributes:
        broadcast: the latest load's events; None before the first and after :meth:`forget`.
        error: why the latest load failed; None after one that did not.
        outcomes: how many loads have ended with ``ready``, ``error`` and ``cancelled``.
    """

    def __init__(self, host: Host) -> None:
        self.broadcast: LoadingBroadcast | None = None
        self.error: RbeeError | None = None
        self.outcomes: Counter[str] = Counter()
        self._host = host
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, model: str | None, config: EngineConfig, plan: LoadPlan | None, *, unload_first: bool) -> None:
        """Start a load; the one before must have ended.

        Args:
            model: what MODEL means on the command line.
            config: where and how it is to run.
            plan: of it, where there is one already.
            unload_first: have the resident model unloaded before the new one takes memory.
        """
        self.error = None
        logger.info("loading %s", model or DEFAULT_MODEL)
        self._cancel = cancel = threading.Event()
        self.broadcast = broadcast = LoadingBroadcast()
        make_room = functools.partial(self._host.make_room, cancel) if unload_first else None
        install = functools.partial(self._host.take_over, cancel=cancel)
        loading = load_model(model, config, cancel, install, plan=plan, make_room=make_room)
        # The context carries the request's correlation id into the load's log lines.
        run = functools.partial(contextvars.copy_context().run, self._run, loading, broadcast)
        self._thread = threading.Thread(target=run, name="loader", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Ask the running load to end with ``cancelled``."""
        self._cancel.set()

    def forget(self) -> None:
        """There is no load to speak of any more."""
        self.broadcast = self.error = None

    def join(self, seconds: float) -> None:
        """Wait for the running load's thread, for a while."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, loading: Loading, broadcast: LoadingBroadcast) -> None:
        event: LoadingEvent = Resolving(seq=-1, elapsed_seconds=0.0, model="")
        try:
            for event in loading:
                if not event.terminal:
                    self._host.publish(broadcast, event)
            end = event
        except BaseException as error:  # noqa: BLE001  (whatever it was, watchers get their terminal event)
            end = self._failed(error, event)
        # Told last: who sees the end finds the model in place, the error known, and the way free for another load.
        self.outcomes[end.stage] += 1
        if not isinstance(end, LoadFailed):
            logger.info("loading ended: %s after %.1f s", end.stage, end.elapsed_seconds)
        self._host.load_has_ended()
        self._host.publish(broadcast, end)

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
