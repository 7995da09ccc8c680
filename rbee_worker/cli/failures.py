"""How a command ends: exit codes, the one message of a failure, and what signals do."""

import functools
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, ParamSpec

import typer

from rbee_worker import log
from rbee_worker.errors import DeviceUnavailable, OutOfMemory, RbeeError, Setting
from rbee_worker.escape import one_line
from rbee_worker.panics import panics_as_errors

P = ParamSpec("P")

EXIT_UNEXPECTED = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE: what a shell reports for any program whose reader has left, as in ``… | head``."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.strsignal(signum))
        self.exit_code = 128 + signum


class Interrupts:
    """What SIGINT and SIGTERM do while :func:`interrupts` is open."""

    def __init__(self, stop: Callable[[], object] | None) -> None:
        self._stop = stop
        self._received: int | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature signal.signal wants
        """Ask politely first, when there is someone to ask; then raise; then leave it to the operating system."""
        polite = self._stop is not None and self._received is None
        self._received = signum
        if self._stop is not None and polite:
            self._stop()
            return
        signal.signal(signum, signal.SIG_DFL)
        raise Interrupted(signum)

    def check(self) -> None:
        """Raise :class:`Interrupted` when a signal came."""
        if self._received is not None:
            raise Interrupted(self._received)


@contextmanager
def interrupts(stop: Callable[[], object] | None = None) -> Iterator[Interrupts]:
    """SIGINT and SIGTERM call ``stop`` the first time and raise :class:`Interrupted` the second; without, at once.

    A signal that was ignored when the program started (``nohup``, a shell's background job) stays ignored.
    """
    handler = Interrupts(stop)
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        previous = {signum: old for signum, old in previous.items() if old not in {signal.SIG_IGN, None}}
    try:
        for signum in previous:
            signal.signal(signum, handler.handle)
        yield handler
    finally:
        for signum, old in previous.items():
            signal.signal(signum, old)


def reported(command: Callable[P, int | None]) -> Callable[P, None]:
    """A command whose failures end in one message on stderr and an exit code, and which may return its exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with panics_as_errors():
                code = command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Interrupted as interrupt:
            code = interrupt.exit_code
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        except BrokenPipeError:
            _leave_pipe()
        except RbeeError as error:
            _say(error.message, advice(error))
            code = error.exit_code
        except Exception as error:  # noqa: BLE001 - the last resort: no traceback reaches a user who did not ask for it
            what = one_line(f"{type(error).__name__}: {error}")
            _say(f"unexpected {what}", "Run it again with --log-level debug for the traceback.")
            code = EXIT_UNEXPECTED
        if code:
            raise typer.Exit(code)

    return run


def advice(error: RbeeError) -> str:
    """What to do about an error, in the words of the command line; empty: nothing is known."""
    shown = ""
    if isinstance(error, DeviceUnavailable):
        shown = "`rbee-worker devices` lists what there is."
    elif isinstance(error, OutOfMemory) and not error.remedies:
        shown = "`rbee-worker devices` shows what is free."
    return " ".join(filter(None, (error.advice(_option), shown)))


def _option(name: Setting, value: str | int) -> str:
    return f"--{name.replace('_', '-')} {value}"


def _say(message: str, hint: str) -> None:
    log.flush()  # what led to it comes before it
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    # Whoever reads stderr may have left with stdout (`2>&1 | head`); the exit code still tells.
    # A closed stderr (`2>&-`) is None.
    with suppress(BrokenPipeError, AttributeError):
        sys.stderr.write(f"error: {message}\n" + (f"hint: {hint}\n" if hint else ""))
        sys.stderr.flush()


def _leave_pipe() -> NoReturn:
    """Exit as a program killed by SIGPIPE does, without Python's complaint about flushing stdout at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(EXIT_BROKEN_PIPE)
