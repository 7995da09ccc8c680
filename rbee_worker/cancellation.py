"""Cancellation: set once, by any thread or signal handler, to end work early."""

import contextlib
from collections.abc import Callable


class Cancellation:
    """A flag that wakes whoever waits for something else meanwhile.

    It has no lock, so that a signal handler may set it whatever the interrupted thread is doing.
    """

    def __init__(self) -> None:
        self._set = False
        self._calls: list[Callable[[], object]] = []

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._set

    def set(self) -> None:
        """Set it, and make the calls."""
        self._set = True
        self._make_calls()

    def on_set(self, call: Callable[[], object]) -> Callable[[], None]:
        """Have ``call`` made once it is set; at once when it is set already. What is returned takes that back."""
        self._calls.append(call)
        if self._set:  # maybe since the line above: whoever takes a call from the list makes it
            self._make_calls()

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._calls.remove(call)

        return forget

    def _make_calls(self) -> None:
        while self._calls:
            try:
                call = self._calls.pop()
            except IndexError:  # another thread took the last one
                return
            call()
