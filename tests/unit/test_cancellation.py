"""What is set wakes those who asked for it, once, whatever comes first."""

import os
import signal

from rbee_worker.cancellation import Cancellation


def test_calls_are_made_once_set_or_at_once_and_once_each() -> None:
    cancel, made = Cancellation(), []
    cancel.on_set(lambda: made.append("before"))
    assert (cancel.is_set(), made) == (False, [])
    cancel.set()
    cancel.set()
    assert (cancel.is_set(), made) == (True, ["before"])
    cancel.on_set(lambda: made.append("after"))
    assert made == ["before", "after"]


def test_a_call_that_was_taken_back_is_not_made() -> None:
    cancel, made = Cancellation(), []
    forget, kept = cancel.on_set(lambda: made.append("taken back")), cancel.on_set(lambda: made.append("kept"))
    forget()
    forget()
    cancel.set()
    kept()
    assert made == ["kept"]


def test_a_signal_handler_may_set_it_while_it_is_being_set() -> None:
    cancel, made = Cancellation(), []
    before = signal.signal(signal.SIGUSR1, lambda *_: cancel.set())
    try:
        cancel.on_set(lambda: made.append("last"))
        cancel.on_set(lambda: os.kill(os.getpid(), signal.SIGUSR1))  # made first
        cancel.set()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert made == ["last"]
