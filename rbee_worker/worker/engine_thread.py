"""EngineThread: the one thread that runs an Engine, and the queue of commands by which others reach it."""

import concurrent.futures
import functools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig
from rbee_worker.errors import Cancelled, InferenceError
from rbee_worker.runtime.engine.engine import Engine, JobEvents
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.engine.stats import EngineStats
from rbee_worker.runtime.loading.load import LoadedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")


class EngineThread:
    """Steps an engine while it has work, and sleeps while it has none.

    Args:
        config: of the engine.
        deliver: takes the events of each step; called on this thread.
        changed: called, on any thread, when ``exclusive`` or ``alive`` has changed.
        died: called on this thread when something broke that the engine does not recover from.

    Attributes:
        exclusive: an action waits for, or has, the engine without jobs; no new jobs should come.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        deliver: Callable[[JobEvents], None],
        changed: Callable[[], None],
        died: Callable[[], None],
    ) -> None:
        self.exclusive = False
        self._engine = Engine(config)
        self._deliver = deliver
        self._changed = changed
        self._died = died
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._between_jobs: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._awaited: set[Future[Any]] = set()
        self._ended = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._ended

    @property
    def model(self) -> LoadedModel | None:
        """The model that serves. Its tokenizer may be used by any thread, its weights by this one alone."""
        return self._engine.model

    @property
    def stats(self) -> EngineStats:
        """What the engine has done and holds; any thread may ask."""
        return self._engine.stats

    @property
    def running(self) -> int:
        """Sequences with a place in the batch; any thread may ask."""
        return self._engine.running

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End the thread after the step it is in, waiting for a while. It frees the model itself."""
        self._stopping.set()
        self._commands.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(seconds)

    def add(
        self, sequences: list[Sequence], model: LoadedModel | None, refused: Callable[[list[Sequence]], None]
    ) -> None:
        """Have sequences run that were prepared for ``model``; ``refused`` is called when another serves by then."""

        def command() -> None:
            if model is not self._engine.model:
                refused(sequences)
                return
            for sequence in sequences:
                self._engine.add(sequence)

        self._commands.put(command)

    def cancel(self, job_id: str) -> None:
        """Have a job ended; in turn, so that this cannot overtake the job."""
        self._commands.put(functools.partial(self._engine.cancel, job_id))

    def unload(self, cancel: Cancellation | None = None) -> int:
        """Free the model once no job is left; returns the bytes of weights freed. Raises as :meth:`install`."""
        return self._alone(self._engine.unload, cancel)

    def install(self, model: LoadedModel, cancel: Cancellation) -> None:
        """Make ``model`` the one that serves once no job is left.

        Raises:
            Cancelled: ``cancel`` was set before that.
            InferenceError: the thread has ended.
        """
        self._alone(functools.partial(self._engine.install, model), cancel)

    def _alone(self, action: Callable[[], T], cancel: Cancellation | None) -> T:
        """Have the thread run ``action`` between two steps, once no job is left, and wait for its result."""
        result: Future[T] = Future()

        def act() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(action())
            except BaseException as error:  # noqa: BLE001  (whoever waits for the result gets it)
                result.set_exception(error)

        with self._lock:
            if self._ended:
                raise _dead()
            self._awaited.add(result)
        if cancel is not None:
            cancel.on_set(result.cancel)
        self._set_exclusive(exclusive=True)
        try:
            self._commands.put(functools.partial(self._between_jobs.append, act))
            return result.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("The load was cancelled.") from None
        finally:
            with self._lock:
                self._awaited.discard(result)
            self._set_exclusive(exclusive=False)

    def _set_exclusive(self, *, exclusive: bool) -> None:
        self.exclusive = exclusive
        self._changed()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._run_commands(wait=not self._engine.has_work)
                # Twice, so that `started` does not wait for a long prompt's first pass.
                for part in (self._engine.admit, self._engine.step):
                    if events := part():
                        self._deliver(events)
                while self._between_jobs and not self._engine.has_work:
                    self._between_jobs.pop(0)()
        except BaseException:
            logger.exception("the engine died")
            self._end()
            self._died()
        else:
            self._engine.unload()
            self._end()

    def _end(self) -> None:
        """Nothing runs any more: let nobody wait."""
        with self._lock:
            self._ended = True
            left = [result for result in self._awaited if not result.done()]
        for result in left:
            if result.set_running_or_notify_cancel():
                result.set_exception(_dead())
        self._changed()

    def _run_commands(self, *, wait: bool) -> None:
        """Run the commands that are there, all of them, so that none waits for more than one step."""
        if wait:
            self._commands.get()()
        for _ in range(self._commands.qsize()):
            self._commands.get()()


def _dead() -> InferenceError:
    return InferenceError("The engine has died; restart the worker.")
