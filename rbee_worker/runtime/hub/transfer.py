"""Downloads files over HTTP: several at once, resumed where they broke off, checked against their digests.

A file grows as ``<blob>.incomplete``. It gets its own name when it is complete and its digest is right. So a transfer
may end at any time, and the next one continues from what has arrived. Bytes are written as they arrive, and the count
of bytes is what is on disk. After a failure that may pass, the file is tried again, with growing pauses. When bytes
arrive, the count of tries begins again. Silence alone never fails a transfer.
"""

import contextlib
import errno
import hashlib
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final, Literal

import httpx

from rbee_worker.errors import DiskFull, ModelError, ModelMalformed, ModelNotFound, sentence
from rbee_worker.escape import reason

WORKERS: Final = 4
"""How many files are fetched at the same time."""

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0
"""When no byte arrives for so long, the connection is closed and a new one is made."""

RETRY_SECONDS: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses before the tries that follow a failed one. When the last of them fails too, the transfer fails."""

LONGEST_RETRY_AFTER = 60.0

_HASH_CHUNK: Final = 1024 * 1024
_JOIN_SECONDS: Final = 0.15
_POLL_SECONDS: Final = 0.1
_HTTP_OK: Final = 200
_HTTP_PARTIAL: Final = 206
_HTTP_RANGE_REFUSED: Final = 416
_RETRIED_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file to fetch.

    Attributes:
        name: its name for messages; unique in a transfer.
        url: where it is fetched from.
        size: in bytes.
        digest: of the whole file, in hexadecimal; None: only the size is checked.
        algorithm: of the digest: SHA-256, or Git's: SHA-1 of ``blob <size>`` NUL and the content.
        blob: the path on disk.
    """

    name: str
    url: str
    size: int
    digest: str | None
    algorithm: Literal["sha256", "git-sha1"]
    blob: Path

    @property
    def partial(self) -> Path:
        """The path on disk while the file is not complete."""
        return self.blob.with_name(self.blob.name + ".incomplete")

    @property
    def bytes_on_disk(self) -> int:
        """How many of its bytes are on disk already."""
        for path in (self.blob, self.partial):
            with contextlib.suppress(OSError):
                return min(path.stat().st_size, self.size)
        return 0


class ConnectionLost(Exception):
    """A failure after which another try may help. ``pause``: seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Refused(Exception):
    """The server refuses to send a file. ``code``: the value of its header ``X-Error-Code``."""

    def __init__(self, file: RemoteFile, status: int, code: str) -> None:
        super().__init__(f"{file.name}: HTTP status {status}")
        self.status = status
        self.code = code


class _Stopped(Exception):
    """The transfer was closed."""


class Transfer:
    """Fetches files on its own threads.

    Attributes:
        files: in the order in which they are started.
        bytes_total: bytes of all files.
        last_byte_at: when a byte last arrived or was checked, as ``time.monotonic`` gives it.
    """

    def __init__(
        self,
        files: Iterable[RemoteFile],
        *,
        headers: Mapping[str, str],
        lock: Callable[[RemoteFile, float], AbstractContextManager[object]],
        install: Callable[[RemoteFile], None],
    ) -> None:
        """Prepare a transfer; :meth:`start` starts it.

        Args:
            files: the files to fetch.
            headers: sent with every request.
            lock: keeps other processes from fetching the same file. Raises TimeoutError after the given seconds.
            install: called with each file when it is complete. May raise :class:`ConnectionLost`.
        """
        self.files = tuple(files)
        self.bytes_total = sum(file.size for file in self.files)
        self.last_byte_at = time.monotonic()
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._lock = lock
        self._install = install
        self._done = {file.name: file.bytes_on_disk for file in self.files}
        self._waiting = deque(self.files)
        self._active: set[str] = set()
        self._stop = threading.Event()
        self._ended = threading.Condition()
        self._running = 0
        self._interrupted = False
        self._failure: BaseException | None = None
        self._sockets: list[Any] = []
        self._client = httpx.Client(
            follow_redirects=True, timeout=httpx.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS), headers=self._headers
        )
        self._threads = [
            threading.Thread(target=self._work, name=f"download-{i}", daemon=True)
            for i in range(min(WORKERS, len(self.files)))
        ]

    @property
    def bytes_done(self) -> int:
        """Bytes on disk, those of earlier transfers included."""
        return sum(self._done.values())

    @property
    def reading(self) -> str:
        """Names of the files that are being fetched now, separated by commas."""
        return ", ".join(sorted(self._active.copy()))

    def start(self) -> None:
        """Start the threads."""
        self._running = len(self._threads)
        for thread in self._threads:
            thread.start()

    def interrupt(self) -> None:
        """Let :meth:`wait` wait no more; any thread or signal handler may call this."""
        with self._ended:
            self._interrupted = True
            self._ended.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait for the transfer to end, at most ``seconds``, and not beyond :meth:`interrupt`. Returns whether it has.

        Raises:
            Exception: the failure that ended it: a :class:`ModelError`, :class:`Refused` or what ``install`` raised.
        """
        with self._ended:
            self._ended.wait_for(lambda: self._interrupted or self._running == 0, seconds)
            ended = self._running == 0
        if ended and self._failure is not None:
            raise self._failure
        return ended

    def close(self) -> None:
        """End the transfer now. Threads that wait for bytes are woken. What has arrived stays for the next transfer."""
        self._halt()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(deadline - time.monotonic(), 0))
        if self._running == 0:
            self._client.close()

    def _halt(self) -> None:
        self._stop.set()
        for stream in list(self._sockets):
            _shut_down(stream)

    # -- on the threads

    def _work(self) -> None:
        try:
            while not self._stop.is_set() and self._waiting:
                with contextlib.suppress(IndexError):
                    self._fetch(self._waiting.popleft())
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  (wait() raises it)
            if not self._stop.is_set():
                self._failure = error
                self._halt()
        finally:
            with self._ended:
                self._running -= 1
                if self._running == 0 and self._stop.is_set():
                    self._client.close()  # close() may have returned before this thread ended
                self._ended.notify_all()

    def _fetch(self, file: RemoteFile) -> None:
        """Fetch, check and install a file. After failures that may pass, try again."""
        self._active.add(file.name)
        tries = 0
        while True:
            before = self._done[file.name]
            try:
                self._try(file)
            except httpx.ReadTimeout:
                continue
            except (ConnectionLost, httpx.TransportError) as error:
                self._raise_if_stopped()
                tries = 0 if self._done[file.name] > before else tries
                if tries == len(RETRY_SECONDS):
                    raise self._gave_up(file, tries + 1, error) from error
                pause = max(RETRY_SECONDS[tries], getattr(error, "pause", 0.0))
                tries += 1
                self._stop.wait(pause)
                self._raise_if_stopped()
            except OSError as error:
                raise self._cannot_store(file, error) from error
            else:
                self._active.discard(file.name)
                return

    def _try(self, file: RemoteFile) -> None:
        with self._locked(file):
            if not file.blob.exists():
                self._receive(file)
                self._verify(file)
                file.partial.replace(file.blob)
        self._done[file.name] = file.size
        self._install(file)

    @contextlib.contextmanager
    def _locked(self, file: RemoteFile) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            while True:
                self._raise_if_stopped()
                with contextlib.suppress(TimeoutError):
                    stack.enter_context(self._lock(file, _POLL_SECONDS))
                    break
            yield

    def _receive(self, file: RemoteFile) -> None:
        """Bring the partial file to its full size."""
        start = _size_of(file.partial)
        if start > file.size:
            file.partial.unlink()
            start = 0
        self._done[file.name] = start
        if start == file.size and file.partial.exists():
            return
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._client.stream("GET", file.url, headers=headers, extensions={"trace": self._trace}) as response:
            start = _start_of(file, response, start)
            with FileIO(file.partial, "r+" if start else "w") as out:
                out.seek(start)
                self._done[file.name] = start
                for chunk in response.iter_bytes():
                    self._raise_if_stopped()
                    try:
                        _write(out, chunk)
                    finally:  # a full disk may take only a part of the chunk
                        self._done[file.name] = out.tell()
                    self.last_byte_at = time.monotonic()
                    if out.tell() > file.size:
                        break
        got = _size_of(file.partial)
        if got > file.size:
            file.partial.unlink()
            self._done[file.name] = 0
            raise ModelMalformed(f"{file.name}: the hub lists {file.size:,} bytes and sends more.", hint=_AGAIN)
        if got < file.size:
            raise ConnectionLost(f"the connection ended after {got:,} of {file.size:,} bytes")

    def _verify(self, file: RemoteFile) -> None:
        """Compare the file on disk with its digest. A file that differs is removed."""
        if file.digest is None:
            return
        if file.algorithm == "sha256":
            digest = hashlib.sha256()
        else:  # the hub lists Git's hash of the file, which is SHA-1
            digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        with file.partial.open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK):
                self._raise_if_stopped()
                digest.update(chunk)
                self.last_byte_at = time.monotonic()
        if digest.hexdigest() != file.digest:
            file.partial.unlink()
            self._done[file.name] = 0
            name = "SHA-256" if file.algorithm == "sha256" else "Git SHA-1"
            raise ModelMalformed(
                f"{file.name}: what arrived is not what the hub lists: {name} {digest.hexdigest()}, "
                f"expected {file.digest}. The file was removed.",
                hint=_AGAIN,
            )

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Remember the stream of each connection. A thread that waits for bytes wakes when its socket is shut down."""
        if event in {"connection.connect_tcp.complete", "connection.start_tls.complete"}:
            self._sockets.append(info["return_value"])
            if self._stop.is_set():
                _shut_down(info["return_value"])

    def _gave_up(self, file: RemoteFile, tries: int, error: Exception) -> ModelNotFound:
        return ModelNotFound(
            f"{file.name}: the download broke off {tries} times in a row at {self._done[file.name]:,} of "
            f"{file.size:,} bytes: {sentence(reason(error))}",
            hint="Check the network and load it again: what arrived is kept, and the download goes on from there.",
        )

    def _cannot_store(self, file: RemoteFile, error: OSError) -> ModelError:
        if error.errno in _FULL:
            return disk_full(self.bytes_total - self.bytes_done, file.blob.parent, file.name)
        return ModelError(
            f"{file.name}: cannot be stored in {file.blob.parent}: {error.strerror or error}.",
            hint="Set HF_HOME to a folder that can be written.",
        )


_AGAIN: Final = "Load it again to fetch the file anew; if that repeats, something between here and the hub alters it."


def disk_full(needed: int, folder: Path, what: str) -> DiskFull:
    """The error when ``needed`` more bytes do not fit into ``folder``. ``what``: the name for the message."""
    return DiskFull(
        f"{what}: {needed:,} bytes are still to be fetched, and {free_bytes(folder):,} bytes are free in {folder}.",
        hint="Free some space and load it again (what arrived is kept), or set HF_HOME to a folder on a larger disk.",
    )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of ``folder``, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _start_of(file: RemoteFile, response: httpx.Response, asked: int) -> int:
    """The position in the file at which the body of a response begins.

    Raises:
        ConnectionLost: the range was not sent, or a status after which another try may help.
        Refused: any other status.
    """
    status = response.status_code
    if status == _HTTP_OK:
        return 0
    if status == _HTTP_PARTIAL and response.headers.get("Content-Range", "").startswith(f"bytes {asked}-"):
        return asked
    if status in {_HTTP_PARTIAL, _HTTP_RANGE_REFUSED}:
        file.partial.unlink(missing_ok=True)
        raise ConnectionLost(f"the server did not give the range from byte {asked:,}")
    if status in _RETRIED_STATUSES:
        asked_pause = response.headers.get("Retry-After", "")
        pause = min(float(asked_pause), LONGEST_RETRY_AFTER) if asked_pause.isdecimal() else 0.0
        raise ConnectionLost(f"HTTP status {status}", pause)
    raise Refused(file, status, response.headers.get("X-Error-Code", ""))


def _write(out: FileIO, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        left = left[out.write(left) :]


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _shut_down(stream: Any) -> None:
    """Wake the thread that reads from a network stream of httpx."""
    connection = stream.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):
        connection.shutdown(2)  # SHUT_RDWR
