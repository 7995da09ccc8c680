"""What strangers send: each gets an error or its connection is closed, and no one else loses a token.

A well-behaved stream runs beside every test; behind each, the worker is as it was before.
"""

import base64
import gzip
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.tiny import CHAT_TEMPLATE, write_tiny_model

from .conftest import SECONDS, Served, events_of, serving

INFER = "/v1/inference"
COMPLETE = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPOND = "/v1/responses"
MESSAGES = [{"role": "user", "content": "x"}]
OK = b'{"prompt":"x","max_tokens":2,"ignore_eos":true}'
CONNECTIONS = 48

# The limits that no option sets, short enough to wait for.
IMPATIENT = """
import functools, sys
from rbee_worker.config import EngineConfig, ServerConfig
from rbee_worker.log import configure
from rbee_worker.server import run
configure("info", "text")
run.create_app = functools.partial(run.create_app, body_seconds=1.0)
limits = ServerConfig(
    port=0, max_connections=int(sys.argv[2]), header_seconds=1.0, idle_seconds=2.0, send_timeout_seconds=1.0
)
sys.exit(run.serve(limits, EngineConfig(max_batch_size=4), sys.argv[1]))
"""


def eventually(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = write_tiny_model(
        tmp_path_factory.mktemp("abused") / "tiny", chat_template=CHAT_TEMPLATE, max_position_embeddings=4096
    )
    command = [sys.executable, "-c", IMPATIENT, str(model), str(CONNECTIONS)]
    with serving(command=command) as served:
        # What is opened once and kept is open now: the process in which grammars are tried, threads.
        assert served.infer(prompt="x", max_tokens=2, regex="[ab]+")[-1]["event"] == "end"
        yield served
        assert not [line for line in served.log if "Traceback" in line or " ERROR " in line]


def descriptors(worker: Served) -> int:
    return len(os.listdir(f"/proc/{worker.process.pid}/fd"))


class Beside:
    """A client that streams one text after the other and looks at every token."""

    def __init__(self, worker: Served) -> None:
        self.tokens = 0
        self.broken = ""
        self._worker = worker
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.goes_on()

    def goes_on(self) -> None:
        """Wait for more of its tokens."""
        before = self.tokens
        eventually(lambda: self.tokens > before or self.broken)
        assert not self.broken

    def leave(self) -> None:
        """Cancel its job, in order; nothing may be missing of what came before."""
        self._leaving.set()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        assert not self.broken

    def _run(self) -> None:
        try:
            while not self._leaving.is_set():
                self._stream(f"beside-{uuid.uuid4()}")
        except Exception as error:  # noqa: BLE001 - told to the test, which runs in another thread
            self.broken = repr(error)

    def _stream(self, job_id: str) -> None:
        body = {"prompt": "x", "job_id": job_id, "ignore_eos": True, "max_tokens": 4000, "temperature": 0}
        # The same letter again and again, so that text and events can be counted.
        body |= {"logit_bias": {"97": 100}}
        received, cancelled = b"", False
        with httpx.stream("POST", self._worker.url + INFER, json=body, timeout=SECONDS) as response:
            assert response.status_code == 200
            for chunk in response.iter_bytes():
                received += chunk
                self.tokens += chunk.count(b'"event":"token"')
                if self._leaving.is_set() and not cancelled:
                    cancelled = True
                    httpx.delete(f"{self._worker.url}{INFER}/{job_id}", timeout=SECONDS)
        _, *tokens, end = events_of(received)
        assert end["stop_reason"] in {"cancelled", "max_tokens"}, end
        assert [token["i"] for token in tokens] == list(range(end["tokens_out"]))
        assert len({token["t"] for token in tokens}) <= 1


@pytest.fixture(autouse=True)
def beside(worker: Served) -> Iterator[Beside]:
    """The other client; behind the test nothing is left of either."""
    before = descriptors(worker)
    client = Beside(worker)
    yield client
    client.goes_on()
    client.leave()
    eventually(lambda: describe(worker)["running"] + describe(worker)["queued"] == 0)
    eventually(lambda: descriptors(worker) <= before)
    assert httpx.get(f"{worker.url}/livez").status_code == 200


def describe(worker: Served) -> dict[str, Any]:
    return httpx.get(f"{worker.url}/v1/worker", timeout=SECONDS).json()


# -- bytes out, bytes in


@contextmanager
def connected(worker: Served) -> Iterator[socket.socket]:
    with socket.create_connection(worker.address, timeout=SECONDS) as sock:
        yield sock


def to_the_end(sock: socket.socket) -> bytes:
    """Everything until the worker closes the connection."""
    out = b""
    try:
        while data := sock.recv(65536):
            out += data
    except ConnectionError:
        pass
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
        try:
            sock.sendall(request)
        except ConnectionError:
            pass  # refused before it was whole; the answer is there all the same
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


REFUSED: dict[str, tuple[bytes, int, str]] = {
    # Bodies.
    "not JSON": (post(INFER, b"{oops"), 400, "INVALID_REQUEST"),
    "deep lists": (post(INFER, b"[" * 1_000_000), 400, "INVALID_REQUEST"),
    "deep objects": (post(INFER, b'{"a":' * 500_000), 400, "INVALID_REQUEST"),
    "a deep schema": (
        post(INFER, b'{"prompt":"x","json_schema":' + b'{"a":' * 900 + b"1" + b"}" * 901),
        400,
        "INVALID_REQUEST",
    ),
    "bad UTF-8": (post(INFER, b'{"prompt":"\xff\xfe"}'), 400, "INVALID_REQUEST"),
    "UTF-16": (post(INFER, '{"prompt":"x"}'.encode("utf-16")), 400, "INVALID_REQUEST"),
    "half a surrogate pair": (post(INFER, b'{"prompt":"\\ud800"}'), 400, "INVALID_REQUEST"),
    "NUL in a string": (post(INFER, b'{"prompt":"a\x00b"}'), 400, "INVALID_REQUEST"),
    "nothing but NUL": (post(INFER, b"\x00" * 100_000), 400, "INVALID_REQUEST"),
    "a number of digits": (post(INFER, b'{"prompt":"x","seed":' + b"1" * 1_000_000 + b"}"), 400, "INVALID_REQUEST"),
    "infinity": (post(INFER, b'{"prompt":"x","temperature":1e999}'), 400, "INVALID_REQUEST"),
    "a giant prompt": (post(INFER, {"prompt": "x" * 3_000_000}), 400, "CONTEXT_TOO_LONG"),
    "a giant body": (post(INFER, {"prompt": "x" * 5_000_000}), 413, "BODY_TOO_LARGE"),
    "a giant body that is only announced": (
        head(b"POST", INFER.encode(), b"Content-Length: 1000000000000", b"Expect: 100-continue"),
        413,
        "BODY_TOO_LARGE",
    ),
    "a giant body in chunks": (chunked((b"40000\r\n" + b" " * 0x40000 + b"\r\n") * 20), 413, "BODY_TOO_LARGE"),
    "a million stop strings": (post(INFER, {"prompt": "x", "stop": ["a"] * 900_000}), 400, "INVALID_REQUEST"),
    "a long stop string": (post(INFER, {"prompt": "x", "stop": "a" * 100_000}), 400, "INVALID_REQUEST"),
    "a hundred thousand biases": (
        post(INFER, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(100_000)}}),
        400,
        "INVALID_REQUEST",
    ),
    "biases of no tokens": (post(INFER, {"prompt": "x", "logit_bias": {"999999999": 1}}), 400, "INVALID_REQUEST"),
    "a billion answers": (post(COMPLETE, {"prompt": "x", "n": 10**9}), 400, "INVALID_REQUEST"),
    "more answers than there is room for": (post(COMPLETE, {"prompt": "x", "n": 128}), 400, "INVALID_REQUEST"),
    "a hundred thousand prompts": (post(COMPLETE, {"prompt": ["x"] * 100_000}), 400, "INVALID_REQUEST"),
    "a million bad prompts": (post(COMPLETE, {"prompt": [[]] * 1_000_000}), 400, "INVALID_REQUEST"),
    "a million bad messages": (post(CHAT, {"messages": [{}] * 1_000_000}), 400, "INVALID_REQUEST"),
    "a million bad parts": (
        post(CHAT, {"messages": [{"role": "user", "content": [0] * 1_300_000}]}),
        400,
        "INVALID_REQUEST",
    ),
    "a million bad tools": (post(CHAT, {"messages": MESSAGES, "tools": [0] * 1_300_000}), 400, "INVALID_REQUEST"),
    "a thousand tools": (
        post(
            CHAT,
            {
                "messages": MESSAGES,
                "tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(1000)],
            },
        ),
        400,
        "INVALID_REQUEST",
    ),
    "a million bad items": (post(RESPOND, {"input": [0] * 1_300_000}), 400, "INVALID_REQUEST"),
    "a long conversation": (post(CHAT, {"messages": MESSAGES * 5000}), 400, "context_length_exceeded"),
    "compressed": (post(INFER, gzip.compress(OK), b"Content-Encoding: gzip"), 415, "BODY_ENCODED"),
    # Framing.
    "two lengths": (post(INFER, OK, b"Content-Length: 5"), 400, "INVALID_REQUEST"),
    "a length and chunks": (post(INFER, OK, b"Transfer-Encoding: chunked"), 400, "INVALID_REQUEST"),
    "a negative length": (head(b"POST", INFER.encode(), b"Content-Length: -5"), 400, "INVALID_REQUEST"),
    "a length of words": (head(b"POST", INFER.encode(), b"Content-Length: five"), 400, "INVALID_REQUEST"),
    "a length beyond all machines": (
        head(b"POST", INFER.encode(), b"Content-Length: 1" + b"0" * 40),
        400,
        "INVALID_REQUEST",
    ),
    "another transfer encoding": (
        head(b"POST", INFER.encode(), b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
        400,
        "INVALID_REQUEST",
    ),
    "a chunk beyond all machines": (chunked(b"F" * 24 + b"\r\nabc"), 400, "INVALID_REQUEST"),
    "a chunk of negative size": (chunked(b"-1\r\nabc"), 400, "INVALID_REQUEST"),
    "chunks of a byte": (chunked(b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n"), 400, "INVALID_REQUEST"),
    "endless trailers": (chunked(b"1\r\n{\r\n0\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n"), 431, "HEADERS_TOO_LARGE"),
    # Heads.
    "a giant header": (get(b"/livez", b"X-A: " + b"a" * 70_000), 431, "HEADERS_TOO_LARGE"),
    "a header without end": (b"GET /livez HTTP/1.1\r\nX-A: " + b"a" * 1_000_000, 431, "HEADERS_TOO_LARGE"),
    "two hundred headers": (get(b"/livez", *[b"X-%d: a" % i for i in range(200)]), 431, "HEADERS_TOO_LARGE"),
    "a header without a colon": (get(b"/livez", b"nothing"), 400, "INVALID_REQUEST"),
    "a header's name with a space": (get(b"/livez", b"X A: b"), 400, "INVALID_REQUEST"),
    "NUL in a header": (get(b"/livez", b"X-A: a\x00b"), 400, "INVALID_REQUEST"),
    "two hosts": (get(b"/livez", b"Host: elsewhere"), 400, "INVALID_REQUEST"),
    "no host": (b"GET /livez HTTP/1.1\r\n\r\n", 400, "INVALID_REQUEST"),
    "another host": (b"GET /v1/worker HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n", 403, "FORBIDDEN"),
    # Targets.
    "upwards": (get(b"/../../etc/passwd"), 404, "NOT_FOUND"),
    "upwards, encoded": (get(b"/%2e%2e/%2e%2e/etc/passwd"), 404, "NOT_FOUND"),
    "upwards from a model": (get(b"/v1/models/../../../etc/passwd"), 404, "model_not_found"),
    "two slashes": (get(b"//v1/worker"), 404, "NOT_FOUND"),
    "a slash at the end": (get(b"/v1/worker/"), 404, "NOT_FOUND"),
    "NUL, encoded": (get(b"/v1/worker%00"), 404, "NOT_FOUND"),
    "NUL": (get(b"/v1/worker\x00"), 400, "INVALID_REQUEST"),
    "bad UTF-8, encoded": (get(b"/%ff%fe"), 404, "NOT_FOUND"),
    "bytes": (get(b"/\xff\xfe"), 400, "INVALID_REQUEST"),
    "backslashes": (get(b"\\v1\\worker"), 404, "NOT_FOUND"),
    "a parameter": (get(b"/livez;x=1"), 404, "NOT_FOUND"),
    "a whole URL": (get(b"http://elsewhere/livez"), 404, "NOT_FOUND"),
    "a long path": (get(b"/" + b"a" * 60_000), 404, "NOT_FOUND"),
    "a longer path": (get(b"/" + b"a" * 70_000), 431, "HEADERS_TOO_LARGE"),
    "an asterisk": (head(b"OPTIONS", b"*"), 404, "NOT_FOUND"),
    "a tunnel": (head(b"CONNECT", b"elsewhere:80"), 404, "NOT_FOUND"),
    # Methods and versions.
    "PUT": (head(b"PUT", INFER.encode()), 405, "METHOD_NOT_ALLOWED"),
    "TRACE": (head(b"TRACE", b"/livez"), 405, "METHOD_NOT_ALLOWED"),
    "a method in small letters": (head(b"get", b"/livez"), 405, "METHOD_NOT_ALLOWED"),
    "a long method": (head(b"A" * 5000, b"/livez"), 405, "METHOD_NOT_ALLOWED"),
    "a method that is none": (head(b"G@T", b"/livez"), 400, "INVALID_REQUEST"),
    "HTTP/0.9": (b"GET /livez\r\n\r\n", 400, "INVALID_REQUEST"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 403, "FORBIDDEN"),
    "TLS": (bytes.fromhex("16030100c8010000c40303") + b"\x00" * 200, 400, "INVALID_REQUEST"),
    "noise": (bytes(range(256)) * 20 + b"\r\n\r\n", 400, "INVALID_REQUEST"),
    "a websocket": (
        get(
            INFER.encode(),
            b"Upgrade: websocket",
            b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: " + base64.b64encode(bytes(16)),
        ).replace(b"Connection: close", b"Connection: Upgrade, close"),
        405,
        "METHOD_NOT_ALLOWED",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_status_and_an_envelope(worker: Served, beside: Beside, name: str) -> None:
    request, status, code = REFUSED[name]
    answered, top, body = exchange(worker, request)
    assert answered == status, (top, body[:500])
    assert "content-type: application/json" in top
    error = envelope(body)
    assert error["code"] == code
    assert len(body) < 40_000
    if status == 405:
        assert re.search(r"^allow: [A-Z, ]+\r?$", top, re.MULTILINE)
    if code == "INVALID_REQUEST" and b"passwd" in request:
        assert b"passwd" not in body


HARMLESS: dict[str, tuple[bytes, int]] = {
    "NUL, escaped": (post(INFER, b'{"prompt":"a\\u0000b","max_tokens":1}'), 200),
    "a number of a hundred thousand decimals": (
        post(INFER, b'{"prompt":"x","max_tokens":1,"temperature":0.' + b"1" * 100_000 + b"}"),
        200,
    ),
    "more than any top_k": (post(INFER, {"prompt": "x", "max_tokens": 2, "top_k": 10**30}), 200),
    "the coldest temperature": (post(INFER, {"prompt": "x", "max_tokens": 2, "temperature": 5e-324}), 200),
    "the least repetition penalty": (post(INFER, {"prompt": "x", "max_tokens": 2, "repetition_penalty": 5e-324}), 200),
    "a query": (get(b"/livez?" + b"a=1&" * 10_000), 200),
    "an encoded path": (get(b"/%6civez"), 200),
    "a job that is none": (head(b"DELETE", b"/v1/inference/..%2f..%2f%00"), 204),
    "chunks": (chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(OK), OK)), 200),
    "a chunk's long extension": (chunked(b"%x;%b\r\n%b\r\n0\r\n\r\n" % (len(OK), b"x" * 30_000, OK)), 200),
    "an expectation": (post(INFER, OK, b"Expect: 100-continue"), 100),
    "an upgrade to HTTP/2": (
        get(b"/livez", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA").replace(
            b"Connection: close", b"Connection: Upgrade, HTTP2-Settings, close"
        ),
        200,
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_odd_but_right(worker: Served, name: str) -> None:
    request, status = HARMLESS[name]
    answered, top, body = exchange(worker, request)
    assert answered == status, (top, body[:500])
    if b"/v1/inference " in request[:30]:
        assert b'"event":"end"' in body
        assert b"data: [DONE]" in body


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
        status, _, answer = parted(to_the_end(sock))
    assert status == 400
    assert envelope(answer)["code"] == "INVALID_REQUEST"


# -- slowness


def trickle(sock: socket.socket, data: bytes) -> bytes:
    """Send a byte now and then until there is an answer; returns it."""
    sock.settimeout(0.05)
    for byte in data:
        try:
            sock.sendall(bytes([byte]))
            if received := sock.recv(65536):
                sock.settimeout(SECONDS)
                return received + to_the_end(sock)
            return b""
        except TimeoutError:
            continue
        except ConnectionError:
            return b""
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
        eventually(lambda: any("unread" in line and "left its bytes" in line for line in worker.log) or cut(worker))
        assert b"[DONE]" not in to_the_end(sock)


def cut(worker: Served) -> bool:
    """Whether the job that nobody reads is over."""
    return any("job_id=unread" in line for line in worker.log)


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
            assert b"404 Not Found" in sock.recv(15)
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


# -- ids, versions


@pytest.mark.parametrize(
    "line",
    [
        b"X-Correlation-ID: a\r\nX-Evil: 1",
        b"X-Correlation-ID: a\nX-Evil: 1",
        b"X-Correlation-ID: 00000000-0000-0000-0000-000000000000\r\n\tX-Evil: 1",
        b"X-Correlation-ID: a%0d%0aX-Evil: 1",
        b"X-Correlation-ID: \xff\xfe",
        b"X-Correlation-ID: " + b"0" * 30_000,
        b"X-Request-ID: evil\r\nX-Correlation-ID: ",
        b"X-Correlation-ID: 00000000-0000-0000-0000-000000000000\r\nX-Correlation-ID: evil",
    ],
)
def test_correlation_ids_inject_nothing(worker: Served, line: bytes) -> None:
    status, top, _ = exchange(worker, get(b"/v1/ready", line))
    assert status == 200
    assert "evil" not in top.lower()
    found = re.findall(r"^x-(?:correlation|request)-id: (.*?)\r?$", top, re.MULTILINE)
    assert len(found) == 2
    assert found[0] == found[1] == str(uuid.UUID(found[0]))


def test_paths_forge_no_log_lines(worker: Served) -> None:
    exchange(worker, get(b"/forged%0d%0a2026-01-01%20ERROR%20evil%1b[2J"))
    lines = eventually(lambda: [line for line in worker.log if "/forged" in line])
    assert len(lines) == 1
    assert "%0d%0a2026-01-01%20ERROR" in lines[0]
    assert "\x1b" not in lines[0]


def test_http_1_0(worker: Served) -> None:
    status, top, body = exchange(worker, b"GET /livez HTTP/1.0\r\n\r\n")
    assert (status, body) == (200, b'{"status":"alive"}')
    request = b"POST /v1/inference HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(OK)
    status, top, body = exchange(worker, request + OK)
    assert status == 200
    assert "transfer-encoding" not in top
    assert events_of(body)[-1]["tokens_out"] == 2
