"""Requests that are wrong, odd or made to deceive: each gets its answer, and no one else loses a token."""

import base64
import gzip
import re
import uuid

import pytest

from tests.integration.conftest import Served, events_of, eventually

from .beside import Beside
from .wire import (
    CHAT,
    COMPLETE,
    INFER,
    MESSAGES,
    OK,
    RESPOND,
    chunked,
    envelope,
    exchange,
    get,
    head,
    post,
)

Case = tuple[bytes, int, str]

BODIES: dict[str, Case] = {
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
    "a giant prompt": (post(INFER, {"prompt": "x" * 300_000}), 400, "CONTEXT_TOO_LONG"),
    "a giant body": (post(INFER, {"prompt": "x" * 5_000_000}), 413, "BODY_TOO_LARGE"),
    "a giant body that is only announced": (
        head(b"POST", INFER.encode(), b"Content-Length: 1000000000000", b"Expect: 100-continue"),
        413,
        "BODY_TOO_LARGE",
    ),
    "a giant body in chunks": (
        chunked((b"40000\r\n" + b" " * 0x40000 + b"\r\n") * 20 + b"0\r\n\r\n"),
        413,
        "BODY_TOO_LARGE",
    ),
    "half a million stop strings": (post(INFER, {"prompt": "x", "stop": ["a"] * 500_000}), 400, "INVALID_REQUEST"),
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
}
FRAMING: dict[str, Case] = {
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
}
HEADS: dict[str, Case] = {
    "a giant header": (get(b"/livez", b"X-A: " + b"a" * 70_000), 431, "HEADERS_TOO_LARGE"),
    "a header without end": (b"GET /livez HTTP/1.1\r\nX-A: " + b"a" * 1_000_000, 431, "HEADERS_TOO_LARGE"),
    "two hundred headers": (get(b"/livez", *[b"X-%d: a" % i for i in range(200)]), 431, "HEADERS_TOO_LARGE"),
    "a header without a colon": (get(b"/livez", b"nothing"), 400, "INVALID_REQUEST"),
    "a header's name with a space": (get(b"/livez", b"X A: b"), 400, "INVALID_REQUEST"),
    "NUL in a header": (get(b"/livez", b"X-A: a\x00b"), 400, "INVALID_REQUEST"),
    "two hosts": (get(b"/livez", b"Host: elsewhere"), 400, "INVALID_REQUEST"),
    "no host": (b"GET /livez HTTP/1.1\r\n\r\n", 400, "INVALID_REQUEST"),
    "another host": (b"GET /v1/worker HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n", 403, "FORBIDDEN"),
}
TARGETS: dict[str, Case] = {
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
}
METHODS: dict[str, Case] = {
    "PUT": (head(b"PUT", INFER.encode()), 405, "METHOD_NOT_ALLOWED"),
    "TRACE": (head(b"TRACE", b"/livez"), 405, "METHOD_NOT_ALLOWED"),
    "a method in small letters": (head(b"get", b"/livez"), 405, "METHOD_NOT_ALLOWED"),
    "a long method": (head(b"A" * 5000, b"/livez"), 405, "METHOD_NOT_ALLOWED"),
    "a method that is none": (head(b"G@T", b"/livez"), 400, "INVALID_REQUEST"),
    "HTTP/0.9": (b"GET /livez\r\n\r\n", 400, "INVALID_REQUEST"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 403, "FORBIDDEN"),
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


@pytest.mark.parametrize(
    "cases", [BODIES, FRAMING, HEADS, TARGETS, METHODS], ids=["bodies", "framing", "heads", "targets", "methods"]
)
def test_it_is_refused_with_a_status_and_an_envelope(worker: Served, beside: Beside, cases: dict[str, Case]) -> None:
    for name, (request, status, code) in cases.items():
        answered, top, body = exchange(worker, request)
        assert answered == status, (name, top, body[:500])
        assert "content-type: application/json" in top, name
        assert envelope(body)["code"] == code, name
        assert len(body) < 40_000, name
        assert b"passwd" not in body, name
        if status == 405:
            assert re.search(r"^allow: [A-Z, ]+\r?$", top, re.MULTILINE), name
        beside.goes_on()


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


def test_odd_but_right(worker: Served, beside: Beside) -> None:
    for name, (request, status) in HARMLESS.items():
        answered, top, body = exchange(worker, request)
        assert answered == status, (name, top, body[:500])
        if request.startswith(b"POST"):
            assert b'"event":"end"' in body, name
            assert b"data: [DONE]" in body, name
        beside.goes_on()


INJECTIONS = (
    b"X-Correlation-ID: a\r\nX-Evil: 1",
    b"X-Correlation-ID: a\nX-Evil: 1",
    b"X-Correlation-ID: 00000000-0000-0000-0000-000000000000\r\n\tX-Evil: 1",
    b"X-Correlation-ID: a%0d%0aX-Evil: 1",
    b"X-Correlation-ID: \xff\xfe",
    b"X-Correlation-ID: " + b"0" * 30_000,
    b"X-Request-ID: evil\r\nX-Correlation-ID: ",
    b"X-Correlation-ID: 00000000-0000-0000-0000-000000000000\r\nX-Correlation-ID: evil",
)


def test_correlation_ids_inject_nothing(worker: Served) -> None:
    for line in INJECTIONS:
        status, top, _ = exchange(worker, get(b"/v1/ready", line))
        assert status == 200, line
        assert "evil" not in top.lower(), line
        found = re.findall(r"^x-(?:correlation|request)-id: (.*?)\r?$", top, re.MULTILINE)
        assert len(found) == 2, line
        assert found[0] == found[1] == str(uuid.UUID(found[0])), line


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
