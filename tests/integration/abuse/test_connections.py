"""What strangers do with connections and grammars: each gets an error or is cut, and no one else loses a token."""

import re
import socket
import threading
import uuid
from contextlib import suppress
from typing import Any

import psutil
import pytest

from tests.integration.conftest import SECONDS, Served, eventually

from .beside import Beside
from .wire import (
    CHAT,
    COMPLETE,
    CONNECTIONS,
    INFER,
    MESSAGES,
    OK,
    chunked,
    connected,
    describe,
    envelope,
    exchange,
    get,
    head,
    parted,
    post,
    to_the_end,
)

BOMBS: dict[str, tuple[str, dict[str, Any]]] = {
    "gigabytes of states": (INFER, {"prompt": "x", "regex": "a?" * 15_000 + "a" * 15_000}),
    "hours of comparing": (
        CHAT,
        {
            "messages": MESSAGES,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"patternProperties": {f"^{i + 4096:x}": {} for i in range(500)}}},
            },
        },
    ),
    "doubled forty times": (
        COMPLETE,
        {
            "prompt": "x",
            "grammar": "\n".join(["start: T0"] + [f"T{n}: T{n + 1} T{n + 1}" for n in range(40)] + ['T40: "a"']),
        },
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_grammar_that_would_take_for_ever(worker: Served, beside: Beside, name: str) -> None:
    path, body = BOMBS[name]
    with connected(worker) as sock:
        sock.sendall(post(path, body))
        beside.goes_on()
        assert exchange(worker, get(b"/readyz"))[0] == 200
        status, _, answer = parted(to_the_end(sock))
    assert status == 400
    error = envelope(answer)
    assert error["code"] == "INVALID_REQUEST"
    assert re.search("more than 2 s|more than 64 MiB|too big", error["message"])
    # The next grammar is served, by a process that is there again.
    assert worker.infer(prompt="x", max_tokens=2, regex=f"[ab]+|{uuid.uuid4()}")[-1]["event"] == "end"


# -- slowness


def trickle(sock: socket.socket, data: bytes) -> bytes:
    """Send a byte now and then until there is an answer; returns it."""
    sock.settimeout(0.05)
    for byte in data:
        with suppress(TimeoutError):
            sock.sendall(bytes([byte]))
            received = sock.recv(65536)
            sock.settimeout(SECONDS)
            return received + to_the_end(sock)
    raise AssertionError("nobody minds")


def test_slow_heads_and_bodies(worker: Served, beside: Beside) -> None:
    begun = [get(b"/livez")[:20], post(INFER, b" " * 1000)[:-999], chunked(b"100\r\n")]
    answers: list[bytes] = []

    def dawdle(beginning: bytes) -> None:
        with connected(worker) as sock:
            sock.sendall(beginning)
            answers.append(trickle(sock, b"a" * 500))

    threads = [threading.Thread(target=dawdle, args=(beginning,)) for beginning in begun * 5]
    for thread in threads:
        thread.start()
    beside.goes_on()
    for thread in threads:
        thread.join(SECONDS)
    assert len(answers) == len(threads)
    for answer in answers:
        status, _, body = parted(answer)
        assert status == 408
        assert envelope(body)["code"] == "REQUEST_TIMEOUT"


def test_silent_connections_are_closed(worker: Served) -> None:
    with connected(worker) as sock:
        assert to_the_end(sock) == b""


def test_half_closed_sockets(worker: Served) -> None:
    for request in (get(b"/livez")[:15], post(INFER, OK)[:-10], post(INFER, OK.replace(b":2", b":4000"))):
        with connected(worker) as sock:
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            answer = to_the_end(sock)
        assert b"[DONE]" not in answer
    eventually(lambda: describe(worker)["running"] <= 1)


def test_clients_that_hang_up_in_the_middle(worker: Served) -> None:
    for request in (get(b"/livez")[:15], post(INFER, OK)[:-10], post(INFER, OK.replace(b":2", b":4000"))) * 5:
        with connected(worker) as sock:
            sock.sendall(request)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset
    eventually(lambda: describe(worker)["running"] <= 1)


def test_clients_that_never_read_a_stream(worker: Served, beside: Beside) -> None:
    body = {"prompt": "x" * 3000, "prompt_logprobs": 20, "logprobs": 20, "ignore_eos": True, "job_id": "unread"}
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(SECONDS)
        sock.connect(worker.address)
        sock.sendall(post(INFER, body))
        beside.goes_on()
        line = eventually(lambda: [line for line in worker.log if "job_id=unread" in line])[0]
        assert "stop_reason=cancelled" in line
        assert b"[DONE]" not in to_the_end(sock)


def test_clients_that_never_read_answers(worker: Served, beside: Beside) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(SECONDS)
        sock.connect(worker.address)
        memory = psutil.Process(worker.process.pid).memory_info().rss
        sock.sendall(head(b"GET", b"/openapi.json", close=False) * 2000)
        beside.goes_on()
        assert psutil.Process(worker.process.pid).memory_info().rss < memory + 64 * 2**20


# -- many


def test_pipelined_requests_are_answered_in_order(worker: Served) -> None:
    targets = [b"/livez", b"/nowhere"] * 50
    with connected(worker) as sock:
        sock.sendall(b"".join(head(b"GET", target, close=False) for target in targets) + get(b"/"))
        answers = to_the_end(sock)
    statuses = re.findall(rb"HTTP/1.1 (\d+)", answers)
    assert statuses == [b"200", b"404"] * 50 + [b"200"]


def test_pipelined_streams_of_a_client_that_leaves(worker: Served) -> None:
    stream = post(INFER, OK.replace(b":2", b":4000")).replace(b"Connection: close\r\n", b"")
    with connected(worker) as sock:
        sock.sendall(stream * 20)
        assert b"200 OK" in sock.recv(1000)
    eventually(lambda: describe(worker)["running"] <= 1)


def test_noise_behind_an_answered_request(worker: Served) -> None:
    for late in (b"-1\r\n", b"\x00\x01\x02\r\n\r\n"):
        with connected(worker) as sock:
            sock.sendall(head(b"POST", b"/nowhere", b"Transfer-Encoding: chunked", close=False))
            assert b" 404 " in sock.recv(15)
            sock.sendall(late)
            assert b"400 Bad Request" not in to_the_end(sock)


def test_more_connections_than_are_served(worker: Served, beside: Beside) -> None:
    silent = [socket.create_connection(worker.address, timeout=SECONDS) for _ in range(CONNECTIONS)]
    try:
        status, top, body = exchange(worker, get(b"/v1/worker"))
        assert status == 503
        assert "retry-after: 1" in top
        assert envelope(body)["code"] == "UNAVAILABLE"
        assert exchange(worker, get(b"/livez"))[0] == 200
        beside.goes_on()
    finally:
        for sock in silent:
            sock.close()
    eventually(lambda: exchange(worker, get(b"/v1/worker"))[0] == 200)


def test_a_flood_of_connections(worker: Served, beside: Beside) -> None:
    flood = []
    for _ in range(CONNECTIONS + 300):
        sock = socket.create_connection(worker.address, timeout=SECONDS)
        sock.setblocking(False)
        flood.append(sock)
    beside.goes_on()
    for sock in flood:
        sock.close()
    eventually(lambda: exchange(worker, get(b"/v1/worker"))[0] == 200)
