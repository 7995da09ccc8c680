"""Opens and reads the files of a model. A stranger chose their kinds and sizes, so both are bounded here."""

import errno
import io
import os
import stat
from pathlib import Path
from typing import Final

from rbee_worker.errors import ModelMalformed, ModelNotFound

_FLAGS: Final = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""Without blocking: to open a named pipe would wait for a writer. Reading a regular file is the same with it."""

_KINDS: Final = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_file(path: Path) -> io.BufferedReader:
    """Open a file of a model to read its bytes. Named pipes, devices and the like are refused: they may never end.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    return io.BufferedReader(open_unbuffered(path))


def open_unbuffered(path: Path) -> io.FileIO:
    """As :func:`open_file`, without Python's buffer."""
    _require_regular(path.stat().st_mode)  # before it is opened too: to open a device may already do something
    stream = io.FileIO(os.open(path, _FLAGS), "rb")
    try:
        _require_regular(os.fstat(stream.fileno()).st_mode)
    except BaseException:
        stream.close()
        raise
    return stream


def read_bytes(path: Path, *, limit: int, hint: str | None = None) -> bytes:
    """A file of at most ``limit`` bytes.

    Args:
        path: the file.
        limit: the most bytes that it may have.
        hint: what to do if there is no such file.

    Raises:
        ModelNotFound: no such file.
        ModelMalformed: it is unreadable, larger, or no regular file.
    """
    try:
        with open_file(path) as stream:
            data = stream.read(limit + 1)
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path}: no such file.", hint=hint) from error
    except OSError as error:
        raise ModelMalformed(f"{path}: cannot be read: {error.strerror or error}.") from error
    if len(data) > limit:
        raise ModelMalformed(f"{path.name} is larger than {limit} bytes, too large for what it should hold.")
    return data


def read_text(path: Path, *, limit: int, hint: str) -> str:
    """A text file of at most ``limit`` bytes.

    Raises:
        ModelNotFound, ModelMalformed: as :func:`read_bytes`; or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit, hint=hint).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelMalformed(f"{path.name} is not UTF-8 (byte {error.start}).", hint=hint) from error


def _require_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(mode), 'a socket')}, not a regular file")
