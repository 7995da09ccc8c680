"""The program as a process of its own, without paying for its imports at every start.

A process that has imported torch and the program (about three seconds) waits for orders and forks: each child is a real
process with its own descriptors, arguments, environment, signals and exit code, and runs the program's ``main`` to the
interpreter's own end. What depends on the interpreter's start, or on variables that torch reads when it is loaded,
starts the installed program instead: see ``conftest.py``.
"""

import array
import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

IMPORTED = (
    "rbee_worker.cli.app",
    "rbee_worker.client",
    "rbee_worker.display",
    "rbee_worker.runtime.convert",
    "rbee_worker.runtime.engine.engine",
    "rbee_worker.runtime.inspection",
    "rbee_worker.server.app",
    "rbee_worker.server.run",
    "llguidance",
)
STREAMS = 3


class ForkServer:
    """The process that forks; one for each test process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fork")
        self.path = str(Path(self._folder.name) / "socket")
        command = [sys.executable, "-m", __name__, self.path]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """End it; children go on."""
        self._process.communicate()
        self._folder.cleanup()


class Process:
    """A running program, and how it ends: as :class:`subprocess.Popen`, without its streams."""

    def __init__(
        self,
        server: ForkServer,
        arguments: Sequence[str],
        env: Mapping[str, str],
        descriptors: Sequence[int],
        *,
        terminal: bool = False,
    ) -> None:
        """``descriptors`` become its 0, 1 and 2 and are closed here; ``terminal``: the one that controls it."""
        self.args = list(arguments)
        self.returncode: int | None = None
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(server.path)
        order = {"arguments": self.args, "env": dict(env), "cwd": str(Path.cwd()), "terminal": terminal}
        text = json.dumps(order).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        self._line.sendmsg([len(text).to_bytes(4, "big")], rights)
        self._line.sendall(text)
        for descriptor in set(descriptors):
            os.close(descriptor)
        self._replies = self._line.makefile("r")
        self.pid = int(self._replies.readline())

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """The exit code, or None."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, minus the signal's number when a signal ended it."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._line], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._replies.readline()))
            self._replies.close()
            self._line.close()
        return self.returncode


class OnTerminal(Process):
    """A running program on a terminal of its own.

    Attributes:
        terminal: the descriptor of the other side: what is typed, and what is shown.
    """

    def __init__(
        self, server: ForkServer, arguments: Sequence[str], env: Mapping[str, str], *, rows: int, columns: int
    ) -> None:
        self.terminal, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (rows, columns))
        super().__init__(server, arguments, env, [theirs] * STREAMS, terminal=True)


class Forked(Process):
    """A running program, as :class:`subprocess.Popen` shows one whose output is piped as text."""

    def __init__(self, server: ForkServer, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        pipes = [os.pipe() for _ in range(STREAMS)]
        self.stdin: IO[str] = os.fdopen(pipes[0][1], "w", encoding="utf-8")
        self.stdout: IO[str] = os.fdopen(pipes[1][0], encoding="utf-8")
        self.stderr: IO[str] = os.fdopen(pipes[2][0], encoding="utf-8")
        super().__init__(server, arguments, env, [pipes[0][0], pipes[1][1], pipes[2][1]])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            stream.close()
        self.wait()

    def communicate(self, text: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """Write, then read to the end of both outputs, and wait."""
        read: dict[str, str] = {}

        def collect(name: str) -> None:
            read[name] = getattr(self, name).read()

        readers = [threading.Thread(target=collect, args=(name,)) for name in ("stdout", "stderr")]
        for reader in readers:
            reader.start()
        self.stdin.write(text or "")
        self.stdin.close()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for reader in readers:
                reader.join()
            self.stdout.close()
            self.stderr.close()
        return read["stdout"], read["stderr"]


def serve(path: str) -> dict[str, Any] | None:
    """Fork for every order; in a child, returns the order. Returns None when standard input ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    running: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    while True:
        ready, _, _ = select.select([0, listener, *running], [], [])
        for source in ready:
            if source == 0:
                return None
            if source is listener:
                line, _ = listener.accept()
                order, descriptors = _received(line)
                pid = os.fork()
                if pid == 0:
                    _become(order, descriptors)
                    return order
                for descriptor in descriptors:
                    os.close(descriptor)
                running[os.pidfd_open(pid)] = pid, line
                line.sendall(b"%d\n" % pid)
            else:
                pid, line = running.pop(source)
                os.close(source)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):  # whoever ordered it is gone
                    line.sendall(b"%d\n" % status)
                line.close()


def _received(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, descriptors, _, _ = socket.recv_fds(line, 4, STREAMS)
    left, parts = int.from_bytes(head, "big"), []
    while left:
        parts.append(line.recv(left))
        left -= len(parts[-1])
    return json.loads(b"".join(parts)), descriptors


def _become(order: dict[str, Any], descriptors: list[int]) -> None:
    """Make the child what a process is that has just been started."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.closerange(STREAMS, max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 1)
    if order["terminal"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace", closefd=False)
    sys.argv = order["arguments"]


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    order = serve(sys.argv[1])
    if order is not None and order["arguments"][1:2] == ["-c"]:
        del sys.argv[0]
        code = sys.argv.pop(1)
        exec(code, {"__name__": "__main__"})  # noqa: S102  (a test's own)
    elif order is not None:
        from rbee_worker.cli import main

        main()
