"""The installed program as a process, and its HTTP as bytes on a socket."""

import atexit
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from rbee_worker.conformance.frames import check_body
from rbee_worker.conformance.order import failures
from tests.tiny import CHAT_TEMPLATE, write_tiny_model

from .forking import Forked, ForkServer

PROGRAM = str(Path(sys.executable).parent / "rbee-worker")
SECONDS = 60.0

WITHOUT_AVX512 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Environment in which torch and its libraries use no more of a CPU than AVX2; `make test` sets the same."""

CAN_FORK = hasattr(os, "pidfd_open")
READ_AT_THE_START = (*WITHOUT_AVX512, "OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTHONWARNINGS", "PYTHONPATH")
"""Variables that the interpreter, torch or their libraries read once."""


@functools.cache
def fork_server() -> ForkServer:
    """This test process's; it ends with it."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def forks(env: Mapping[str, str]) -> bool:
    """Whether a forked process is what a started one would be in this environment."""
    return CAN_FORK and not any(name in env and env[name] != os.environ.get(name) for name in READ_AT_THE_START)


def start(*arguments: str, **env: str) -> "subprocess.Popen[str] | Forked":
    """Start the program, its output piped: forked where that makes no difference, else as it is installed."""
    return start_command([PROGRAM, *arguments], **env)


def start_command(command: list[str], **env: str) -> "subprocess.Popen[str] | Forked":
    """The same for a command that begins with the program, or with the interpreter and ``-c``."""
    own = environment(**env)
    if forks(own):
        return Forked(fork_server(), command, own)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=own)


def run(
    *arguments: str, stdin: str | None = None, timeout: float = SECONDS, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end, its output piped."""
    return end_of(start(*arguments, **env), stdin, timeout)


def run_code(code: str, *arguments: str, timeout: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own to its end, its output piped."""
    return end_of(start_command([sys.executable, "-c", code, *arguments]), None, timeout)


def end_of(
    process: "subprocess.Popen[str] | Forked", stdin: str | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(stdin, timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, err)


def eventually(condition: Callable[[], Any]) -> Any:
    """Wait until something is so; returns what the condition gave."""
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def wait_until_idle(worker: "Served") -> None:
    """Wait until it runs nothing, for far less time than the jobs would take that were cancelled."""
    deadline = time.monotonic() + 5
    while (state := httpx.get(f"{worker.url}/v1/worker").json())["running"] or state["queued"]:
        assert time.monotonic() < deadline, state
        time.sleep(0.02)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would change the program's behaviour."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RBEE_")}
    return kept | changes


@dataclass
class Served:
    """A running ``rbee-worker serve``."""

    process: "subprocess.Popen[str] | Forked"
    url: str
    log: list[str]

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def events(self, path: str = "/v1/loading/progress") -> list[dict[str, Any]]:
        """Every event of a GET stream."""
        return events_of(httpx.get(self.url + path, timeout=SECONDS).text)

    def infer(self, **body: Any) -> list[dict[str, Any]]:
        """Every event of one job."""
        return events_of(httpx.post(self.url + "/v1/inference", json=body, timeout=SECONDS).text)

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Signal it and wait; returns the exit code."""
        self.process.send_signal(signum)
        return self.process.wait(SECONDS)


@contextmanager
def serving(*arguments: str, wait: bool = True, command: Sequence[str] = (), **env: str) -> Iterator[Served]:
    """Start ``rbee-worker serve`` on a port of the system's choice; with ``wait``, until the first load has ended.

    ``command`` is run in its place, as by :func:`start_command`; ``env`` comes to its environment.
    """
    process = start_command(list(command or [PROGRAM, "serve", "--addr", "127.0.0.1:0", *arguments]), **env)
    assert process.stderr is not None
    log: list[str] = []
    try:
        url = ""
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"listening on (https?://[\w.:\[\]-]+)", line):
                url = found[1]
                break
        assert url, "".join(log)
        reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
        reader.start()
        served = Served(process, url, log)
        if wait:
            served.events()
        yield served
    finally:
        if "COVERAGE_PROCESS_CONFIG" in os.environ:  # a process that is killed does not write down what it ran
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        reader.join()
        process.stderr.close()
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that loads in no time."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    path = tmp_path_factory.mktemp("chat") / "tiny-chat"
    return write_tiny_model(path, chat_template=CHAT_TEMPLATE, max_position_embeddings=4096)


@pytest.fixture(scope="session")
def worker(chat_model: Path) -> Iterator[Served]:
    """A worker that serves it, four jobs at a time, four waiting."""
    # In float32 an answer is the same whether or not its prompt was cached.
    options = ("--dtype", "float32", "--max-batch-size", "4", "--max-queue", "4", "--keep-alive", "0.3")
    with serving("--model", str(chat_model), "--served-model-name", "gpt-tiny", *options) as served:
        yield served


@pytest.fixture(scope="session")
def client(worker: Served) -> Iterator[OpenAI]:
    """OpenAI's client of it, which tries nothing again."""
    with OpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Served]:
    """A worker that serves the random model, one job at a time, with keep-alives after 0.2 s."""
    with serving("--model", str(tiny), "--max-batch-size", "1", "--max-queue", "2", "--keep-alive", "0.2") as worker:
        yield worker


@dataclass
class RawResponse:
    """An HTTP response as it came: ``body`` without chunk framing, ``after`` what followed it."""

    status: int
    headers: dict[str, str]
    body: bytes
    chunks: list[bytes]


class RawConnection:
    """One request over a socket, read byte by byte."""

    def __init__(self, address: tuple[str, int], method: str, path: str, body: bytes = b"", **headers: str) -> None:
        self._socket = socket.create_connection(address, timeout=SECONDS)
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self._socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self._received = b""

    def read_until(self, needle: bytes) -> bytes:
        """Everything received so far, once ``needle`` is in it."""
        while needle not in self._received:
            data = self._socket.recv(65536)
            assert data, f"the connection was closed before {needle!r}: {self._received!r}"
            self._received += data
        return self._received

    def finish(self) -> RawResponse:
        """Read to the end of the connection and take the response apart."""
        while data := self._socket.recv(65536):
            self._received += data
        self._socket.close()
        head, _, rest = self._received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        chunks = []
        if headers.get("transfer-encoding") == "chunked":
            while True:
                size, _, rest = rest.partition(b"\r\n")
                length = int(size, 16)
                if length == 0:
                    assert rest == b"\r\n", "bytes after the last chunk"
                    break
                chunks.append(rest[:length])
                assert rest[length : length + 2] == b"\r\n"
                rest = rest[length + 2 :]
            rest = b"".join(chunks)
        return RawResponse(int(first.split()[1]), headers, rest, chunks)

    def close(self) -> None:
        """Leave without reading on."""
        self._socket.close()


def events_of(body: str | bytes) -> list[dict[str, Any]]:
    """The events of an SSE body, which must keep the contract to the byte."""
    events, findings = check_body(body.encode() if isinstance(body, str) else body)
    assert failures(findings) == []
    return [dict(event) for event in events]
