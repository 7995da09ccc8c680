"""Files of weights in memory as they lie on the disk: mapped, and brought in before they count as loaded.

A mapped page belongs to the system's cache of the file. Several processes share it, and under pressure the system may
drop it and read it again. Reading a page that the file no longer has ends the process (SIGBUS): nothing in Python can
catch that. So the system is asked for pages by ``madvise``, which answers with an error instead, and files are checked
for changes where the worker passes by.
"""

import ctypes
import errno
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rbee_worker.errors import InferenceError

_MADV_POPULATE_READ = 22
"""Linux 5.14: bring pages in, as reading them would, and say so when they cannot be had."""


class MappedFile:
    """A file that is mapped to be read. The mapping lives as long as this object or any tensor of it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Map the file behind a descriptor, which may be closed afterwards; ``path`` is for messages.

        Raises:
            OSError: it cannot be mapped.
        """
        try:
            self._bytes = np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        except ValueError as error:
            raise OSError(errno.EINVAL, "the file is empty") from error
        self._address = self._bytes.ctypes.data
        self._name = path.name
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = _state(self._descriptor)

    def check_unchanged(self) -> None:
        """See whether the file is still as it was when it was mapped.

        Raises:
            InferenceError: it was written to, or cut.
        """
        if _state(self._descriptor) != self._state:
            raise InferenceError(
                f"{self._name}: the file was changed while the model runs from it.",
                hint="Load the model again. To change a mapped file, write a new one and rename it.",
            )

    def part(self, offset: int, nbytes: int) -> Tensor:
        """Bytes of the file from ``offset`` on, uint8 [nbytes]. To write to them ends the process.

        Raises:
            InferenceError: the file is shorter by now than its header says.
        """
        if offset + nbytes > len(self._bytes):
            raise InferenceError(f"{self._name}: the file was cut while it was opened.", hint="Load the model again.")
        # torch warns of memory that cannot be written to, and a warning can be silenced for all threads only.
        memory = (ctypes.c_uint8 * nbytes).from_address(self._address + offset)
        memory.mapped = self._bytes  # type: ignore[attr-defined]  # keeps the mapping
        return torch.frombuffer(memory, dtype=torch.uint8)

    def bring_in(self, offset: int, nbytes: int) -> bool:
        """Wait until these bytes are in memory. False: this system has no call for it.

        Raises:
            OSError: they cannot be had: the file has been cut, or the disk has failed.
        """
        advise = _madvise()
        begin = (self._address + offset) // mmap.PAGESIZE * mmap.PAGESIZE
        if advise is None or not advise(begin, self._address + offset + nbytes - begin, _MADV_POPULATE_READ):
            return advise is not None
        code = ctypes.get_errno()
        if code == errno.EINVAL:  # an older kernel
            return False
        code = errno.EIO if code == errno.EFAULT else code  # where touching the page would end the process
        raise OSError(code, os.strerror(code))


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's, called without holding the interpreter's lock: it waits for the disk."""
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
