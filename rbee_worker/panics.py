"""Panics of native libraries as ordinary errors.

A panic of a library written in Rust (tokenizers, llguidance) reaches Python as a ``PanicException``. That is no
``Exception``, so that ``except Exception`` lets it pass: a thread would end without a word to those who wait for it.
Calls into such a library are made within :func:`panics_as_errors`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rbee_worker.escape import one_line


class Panic(Exception):
    """A native library panicked. The message is what it said, on one line; it may hold parts of its input."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic of the body as :class:`Panic`. All else passes as it is, KeyboardInterrupt too."""
    try:
        yield
    except BaseException as error:
        # Each library has a class of its own by this name, and none can be imported.
        if (type(error).__module__, type(error).__name__) != ("pyo3_runtime", "PanicException"):
            raise
        raise Panic(one_line(str(error))) from error
