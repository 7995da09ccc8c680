"""Connections: slow heads, silent ones, crowds, and what is no HTTP."""

import contextlib
import select
import threading

import pytest

HEAD = b"GET /v1/worker HTTP/1.1\r\nHost: localhost\r\n"


def until_closed(sock):
    out = b""
    with contextlib.suppress(ConnectionResetError):  # a byte that was sent too late
        while data := sock.recv(65536):
            out += data
    return out


def answer(sock):
    """The response to one request, whose body is one object."""
    out = b""
    while not out.endswith(b"}"):
        data = sock.recv(65536)
        assert data, out
        out += data
    return out


def until_a_head_is_late(server):
    """Wait for as long as a head may take, beginning now."""
    with server.connect() as sock:
        assert until_closed(sock) == b""


def test_a_head_that_comes_too_slowly(start):
    server = start(header_seconds=0.4)
    with server.connect() as sock:
        left = iter(HEAD)
        while not select.select([sock], [], [], 0.05)[0]:
            sock.sendall(bytes([next(left)]))  # a byte now and then does not buy more time
        reply = until_closed(sock)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b'"code": "REQUEST_TIMEOUT"' in reply


def test_a_connection_that_says_nothing_is_closed(start):
    server = start(header_seconds=0.2)
    with server.connect() as sock:
        assert until_closed(sock) == b""


def test_the_time_for_a_head_begins_again_with_each_request(start):
    server = start(header_seconds=0.3)
    with server.connect() as sock:
        sock.sendall(HEAD + b"\r\n")
        assert answer(sock).startswith(b"HTTP/1.1 200 ")
        until_a_head_is_late(server)  # between two requests there is more time
        sock.sendall(HEAD + b"\r\n")
        assert answer(sock).startswith(b"HTTP/1.1 200 ")
        sock.sendall(HEAD)
        assert until_closed(sock).startswith(b"HTTP/1.1 408 ")


def test_a_connection_is_closed_after_a_long_pause(start):
    server = start(idle_seconds=1)
    with server.connect() as sock:
        sock.sendall(HEAD + b"\r\n")
        assert answer(sock).startswith(b"HTTP/1.1 200 ")
        assert until_closed(sock) == b""


def test_a_stream_may_take_longer_than_its_head(start, stand_in):
    gate = threading.Event()
    server = start(stand_in.Worker([stand_in.started(), gate, stand_in.end()]), header_seconds=0.2)
    stream = server.open("POST", "/v1/inference", {"prompt": "p"})
    stream.read_until(b"started")
    until_a_head_is_late(server)
    gate.set()
    assert stream.finish().frames[-1] == b"data: [DONE]"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS spoken to a plain port
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 80_000, 431),
    ],
)
def test_what_is_no_http_gets_the_envelope(start, request_, status):
    server = start(header_seconds=5)
    with server.connect() as sock:
        sock.sendall(request_)
        sock.settimeout(10)
        reply = until_closed(sock)
    assert reply.startswith(b"HTTP/1.1 %d " % status)
    assert b'{"error": {' in reply
    assert server.ask("GET", "/livez").status == 200
