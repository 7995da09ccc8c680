"""HTTP as bytes: requests that no client would send, and what comes back."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from tests.integration.conftest import SECONDS, Served

INFER = "/v1/inference"
COMPLETE = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPOND = "/v1/responses"
MESSAGES = [{"role": "user", "content": "x"}]
OK = b'{"prompt":"x","max_tokens":2,"ignore_eos":true}'
CONNECTIONS = 48


def describe(worker: Served) -> dict[str, Any]:
    return httpx.get(f"{worker.url}/v1/worker", timeout=SECONDS).json()


@contextmanager
def connected(worker: Served) -> Iterator[socket.socket]:
    with socket.create_connection(worker.address, timeout=SECONDS) as sock:
        yield sock


def to_the_end(sock: socket.socket) -> bytes:
    """Everything until the worker closes the connection."""
    out = b""
    with suppress(ConnectionError):
        while data := sock.recv(65536):
            out += data
    return out


def head(method: bytes, target: bytes, *lines: bytes, close: bool = True) -> bytes:
    last = (b"Connection: close",) if close else ()
    return b"\r\n".join([method + b" " + target + b" HTTP/1.1", b"Host: localhost", *lines, *last, b"", b""])


def get(target: bytes, *lines: bytes) -> bytes:
    return head(b"GET", target, *lines)


def post(path: str, body: Any, *lines: bytes) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(b"POST", path.encode(), b"Content-Length: %d" % len(data), *lines) + data


def chunked(body: bytes, path: str = INFER) -> bytes:
    return head(b"POST", path.encode(), b"Transfer-Encoding: chunked") + body


def exchange(worker: Served, request: bytes) -> tuple[int, str, bytes]:
    """Status, head and body of the answer; status 0: the connection was closed without one."""
    with connected(worker) as sock:
        with suppress(ConnectionError):  # refused before it was whole; the answer is there all the same
            sock.sendall(request)
        return parted(to_the_end(sock))


def parted(answer: bytes) -> tuple[int, str, bytes]:
    if not answer:
        return 0, "", b""
    top, _, body = answer.partition(b"\r\n\r\n")
    return int(top.split(b" ", 2)[1]), top.decode("latin-1"), body


def envelope(body: bytes) -> dict[str, Any]:
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error
