"""Claim: who may change which model is resident. A load or an unload has it, one at a time."""

import threading
from collections.abc import Callable
from typing import Literal

from rbee_worker.cancellation import Cancellation
from rbee_worker.errors import Conflict, Unavailable

Operation = Literal["load", "unload"]


class Claim:
    """The one place there is for a load or an unload; any thread may ask for it.

    Args:
        changed: called, on any thread, when it has been taken or released.

    Attributes:
        holder: what has it now.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.holder: Operation | None = None
        self._changed = changed
        self._lock = threading.Lock()
        self._cancel = Cancellation()
        self._closed = False

    def take(self, operation: Operation) -> Cancellation:
        """Take it; what is returned is set when the holder is to end early.

        Raises:
            Conflict: another operation has it.
            Unavailable: it is closed.
        """
        with self._lock:
            if self._closed:
                raise Unavailable("The worker is shutting down.", retry_after=60)
            if self.holder == "load":
                raise Conflict("A load is running.", hint="Wait for it, or cancel it.")
            if self.holder is not None:
                raise Conflict("The model is being unloaded.", hint="Ask again in a moment.")
            self.holder, self._cancel = operation, Cancellation()
            cancel = self._cancel
        self._changed()
        return cancel

    def release(self) -> None:
        """Let another operation have it."""
        self.holder = None
        self._changed()

    def cancel_load(self) -> bool:
        """Ask the load that has it to end; False when there is none."""
        with self._lock:
            cancel = self._cancel if self.holder == "load" else None
        if cancel is not None:
            cancel.set()
        return cancel is not None

    def close(self) -> None:
        """Let nothing take it any more, and ask a load that has it to end."""
        with self._lock:
            self._closed = True
        self.cancel_load()
