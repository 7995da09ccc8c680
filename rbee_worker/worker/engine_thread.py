"""EngineThread: the one thread that runs an Engine, and the queue of commands by which others reach it."""

import concurrent.futures
import functools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig
from rbee_worker.errors import Cancelled, InferenceError, Unavailable
from rbee_worker.events import InferenceFailed
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
        emit: takes the events of each step, and how many sequences have a place in the batch after it; called on any
            thread.
        changed: called, on any thread, when ``exclusive`` or ``alive`` has changed.
        died: called on this thread when something broke that the engine does not recover from.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        emit: Callable[[JobEvents, int], None],
        changed: Callable[[], None],
        died: Callable[[], None],
    ) -> None:
        self._engine = Engine(config)
        self._emit = emit
        self._changed = changed
        self._died = died
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._turns: dict[Future[Any], Callable[[], Any]] = {}
        self._due: deque[Future[Any]] = deque()
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
    def exclusive(self) -> bool:
        """Whether an action waits for, or has, the engine without jobs; no new jobs should come."""
        with self._lock:
            return any(not turn.done() for turn in self._turns)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End the thread after the step it is in, waiting for a while. It frees the model itself."""
        self._stopping.set()
        self._commands.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(seconds)
            self._end()  # a step may hang for ever

    def add(self, sequences: list[Sequence], model: LoadedModel | None) -> None:
        """Have sequences run that were prepared for ``model``; they fail when another serves by then, or none."""

        def command() -> None:
            if model is self._engine.model:
                for sequence in sequences:
                    self._engine.add(sequence)
            else:
                self._refuse(sequences, Unavailable.code, "The model was replaced; ask again.", self._engine.running)

        with self._lock:
            ended = self._ended
            if not ended:
                self._commands.put(command)
        if ended:
            self._refuse(sequences, InferenceError.code, "The engine died.", 0)

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

    def _refuse(self, sequences: list[Sequence], code: str, message: str, running: int) -> None:
        failure = InferenceFailed(code=code, message=message)
        self._emit([(sequence.job_id, failure) for sequence in sequences], running)

    def _alone(self, action: Callable[[], T], cancel: Cancellation | None) -> T:
        """Have the thread run ``action`` between two steps, once no job is left, and wait for its result."""
        turn: Future[T] = Future()
        turn.add_done_callback(self._turn_over)
        with self._lock:
            if self._ended:
                raise _dead()
            self._turns[turn] = action
        self._changed()
        if cancel is not None:
            cancel.on_set(turn.cancel)
        # As a command, so that it cannot overtake a job that was added before.
        self._commands.put(functools.partial(self._due.append, turn))
        try:
            return turn.result()
        except concurrent.futures.CancelledError:
            cancelled = cancel is not None and cancel.is_set()
            raise (Cancelled("The load was cancelled.") if cancelled else _dead()) from None

    def _turn_over(self, turn: Future[Any]) -> None:
        """Forget an action, and with it the model it may hold; on the thread that ran or cancelled it."""
        with self._lock:
            self._turns.pop(turn, None)
        self._changed()

    def _run(self) -> None:
        try:
            self._step_until_stopped()
            self._engine.unload()
        except BaseException:
            logger.exception("the engine died")
            self._end()
            self._died()
        else:
            self._end()

    def _step_until_stopped(self) -> None:
        told = 0
        while not self._stopping.is_set():
            self._run_commands(wait=not self._engine.has_work)
            # Twice, so that `started` does not wait for a long prompt's first pass.
            for part in (self._engine.admit, self._engine.step):
                events, running = part(), self._engine.running
                if events or running != told:
                    self._emit(events, running)
                    told = running
            while self._due and not self._engine.has_work:
                self._take(self._due.popleft())

    def _take(self, turn: Future[Any]) -> None:
        """Run an action, unless it has been cancelled."""
        with self._lock:
            action = self._turns.get(turn)
        if action is None or not turn.set_running_or_notify_cancel():
            return
        try:
            turn.set_result(action())
        except BaseException as error:  # noqa: BLE001  (whoever waits for the result gets it)
            turn.set_exception(error)

    def _end(self) -> None:
        """Nothing runs any more: let nobody wait."""
        with self._lock:
            self._ended = True
            left = list(self._turns)
        for turn in left:
            turn.cancel()
        self._changed()

    def _run_commands(self, *, wait: bool) -> None:
        """Run the commands that are there, all of them, so that none waits for more than one step."""
        if wait:
            self._commands.get()()
        for _ in range(self._commands.qsize()):
            self._commands.get()()


def _dead() -> InferenceError:
    return InferenceError("The engine has died; restart the worker.")
