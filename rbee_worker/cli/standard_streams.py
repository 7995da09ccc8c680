"""Standard streams that a command can rely on, whatever it was started with.

Standard error carries logs, bars and messages. If it is closed, full, or its reader has left, these are lost, and the
command does its work all the same. Standard output carries the result, so its failures are told.
"""

import io
import os
import sys
from typing import Any, Final

_STDERR: Final = 2


def prepare_standard_streams() -> None:
    """Open what is closed of the three standard descriptors, and make writing to stderr never fail.

    A closed descriptor would be given to the next file that is opened. What a library writes to descriptor 2 would then
    go into that file, or to a client.
    """
    for descriptor in range(_STDERR + 1):
        try:
            os.fstat(descriptor)
        except OSError:
            # It takes the lowest number that is free, which is this one. Writing to it fails, as to a closed one.
            os.open(os.devnull, os.O_RDONLY)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Lossy(_STDERR, "w", closefd=False)),
        encoding=getattr(sys.stderr, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=True,
    )


class _Lossy(io.FileIO):
    """A file to which writing never fails."""

    def write(self, data: Any, /) -> int:
        """Write what can be written. The rest is lost."""
        try:
            return super().write(data)
        except OSError:
            return len(data)
