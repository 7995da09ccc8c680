"""EngineThread: the one thread that runs an Engine, and the queue of commands by which others reach it."""

import contextlib
import functools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from rbee_worker.config import EngineConfig
from rbee_worker.errors import Cancelled, InferenceError
from rbee_worker.runtime.engine.engine import Engine, JobEvents

logger = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_SECONDS = 0.02


class EngineThread:
    """Steps an engine while it has work, and sleeps while it has none.

    Args:
        config: of the engine.
        deliver: takes the events of each step, on this thread.
        died: called, on this thread, when something broke that the engine does not recover from.

    Attributes:
        engine: touch it on this thread only, but for reading ``model`` and calling ``cancel``.
        exclusive: an action waits for, or has, the engine without jobs; no new jobs should come.
    """

    def __init__(self, config: EngineConfig, deliver: Callable[[JobEvents], None], died: Callable[[], None]) -> None:
        self.engine = Engine(config)
        self.exclusive = False
        self._deliver = deliver
        self._died = died
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._between_jobs: list[Callable[[], None]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End the thread after the step it is in, waiting for a while, and free the model."""
        self._stopping.set()
        self._commands.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(seconds)
        self.engine.unload()

    def do(self, command: Callable[[], None]) -> None:
        """Have the thread run ``command`` before its next step; it must not raise."""
        self._commands.put(command)

    def between_jobs(self, action: Callable[[], T], cancel: threading.Event | None = None) -> T:
        """Have the thread run ``action`` between two steps, once no job is left, and wait for its result.

        Raises:
            Cancelled: ``cancel`` was set before the action began.
            InferenceError: the thread has died.
        """
        result: Future[T] = Future()

        def act() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(action())
            except BaseException as error:  # noqa: BLE001  (whoever waits for the result gets it)
                result.set_exception(error)

        self.exclusive = True
        try:
            self.do(functools.partial(self._between_jobs.append, act))
            while True:
                with contextlib.suppress(TimeoutError):
                    return result.result(timeout=_POLL_SECONDS)
                if cancel is not None and cancel.is_set() and result.cancel():
                    raise Cancelled("The load was cancelled.")
                if not self.alive:
                    raise InferenceError("The engine has died; restart the worker.")
        finally:
            self.exclusive = False

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._run_commands(wait=not self.engine.has_work)
                # Twice, so that `started` does not wait for a long prompt's first pass.
                for part in (self.engine.admit, self.engine.step):
                    if events := part():
                        self._deliver(events)
                while self._between_jobs and not self.engine.has_work:
                    self._between_jobs.pop(0)()
        except BaseException:
            logger.exception("the engine died")
            self._died()

    def _run_commands(self, *, wait: bool) -> None:
        """Run the commands that are there, all of them, so that none waits for more than one step."""
        if wait:
            self._commands.get()()
        for _ in range(self._commands.qsize()):
            self._commands.get()()
