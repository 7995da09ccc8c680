"""Turns panics of native libraries into ordinary errors.

A panic in a library written in Rust (tokenizers, llguidance) reaches Python as a ``PanicException``. That is not an
``Exception``, so ``except Exception`` does not catch it, and a thread could end without telling those who wait for it.
Therefore calls into such a library are made inside :func:`panics_as_errors`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rbee_worker.escape import one_line


class Panic(Exception):
    """A native library panicked. The message is the library's, on one line. It may hold parts of the input."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic of the body as :class:`Panic`. All other exceptions pass unchanged, KeyboardInterrupt too."""
    try:
        yield
    except BaseException as error:
        # Each library has a class of its own with this name, and none of them can be imported.
        if (type(error).__module__, type(error).__name__) != ("pyo3_runtime", "PanicException"):
            raise
        raise Panic(one_line(str(error))) from error
