"""How a command ends: exit codes, the one message about a failure, and what signals do."""

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
from rbee_worker.escape import one_line, printable_lines
from rbee_worker.panics import panics_as_errors

P = ParamSpec("P")

EXIT_UNEXPECTED = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE. A shell reports this for a program whose reader has gone, as in ``… | head``."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.strsignal(signum))
        self.exit_code = 128 + signum


class Interrupts:
    """Handles SIGINT and SIGTERM inside :func:`interrupts`."""

    def __init__(self, stop: Callable[[], object] | None) -> None:
        self._stop = stop
        self._received: int | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature signal.signal wants
        """Call ``stop`` at the first signal, if there is one. Raise at the next. One more ends the process at once."""
        polite = self._stop is not None and self._received is None
        self._received = signum
        if self._stop is not None and polite:
            self._stop()
            return
        signal.signal(signum, signal.SIG_DFL)
        raise Interrupted(signum)

    @property
    def came(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)


@contextmanager
def interrupts(stop: Callable[[], object] | None = None) -> Iterator[Interrupts]:
    """Inside, the first SIGINT or SIGTERM calls ``stop``, and the second raises :class:`Interrupted`.

    Without ``stop``, the first one raises. A signal that was ignored when the program started (``nohup``, a shell's
    background job) stays ignored. Outside of the main thread this does nothing.
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
    """Wrap a command so that a failure gives one message on stderr and an exit code.

    ``command`` may return its exit code; None and 0 mean success.
    """

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
        except Exception as error:  # noqa: BLE001 - users see no traceback unless they ask for it
            what = one_line(f"{type(error).__name__}: {error}")
            _say(f"unexpected {what}", "Run it again with --log-level debug for the traceback.")
            code = EXIT_UNEXPECTED
        if code:
            raise typer.Exit(code)

    return run


def advice(error: RbeeError) -> str:
    """What the user can do about an error, in terms of commands and options. Empty: nothing is known."""
    shown = ""
    if isinstance(error, DeviceUnavailable):
        shown = "`rbee-worker devices` lists what there is."
    elif isinstance(error, OutOfMemory) and not error.remedies:
        shown = "`rbee-worker devices` shows what is free."
    return " ".join(filter(None, (error.advice(_option), shown)))


def _option(name: Setting, value: str | int) -> str:
    return f"--{name.replace('_', '-')} {value}"


def _say(message: str, hint: str) -> None:
    log.flush()  # log lines about the failure come before the message
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        sys.stderr.write(printable_lines(traceback.format_exc()))
    sys.stderr.write(f"error: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    sys.stderr.flush()


def _leave_pipe() -> NoReturn:
    """Exit like a program that SIGPIPE ended, without Python's message about flushing stdout."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(EXIT_BROKEN_PIPE)
