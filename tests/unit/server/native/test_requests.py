"""What is refused, and how that is said."""

import json
import logging
import socket
import threading
import time
import uuid
from urllib.parse import quote

import pytest

from rbee_worker.config import LoadSettings
from rbee_worker.errors import (
    Conflict,
    ContextTooLong,
    InferenceError,
    InvalidRequest,
    ModelNotLoaded,
    QueueFull,
    Unavailable,
)
from rbee_worker.server.http.middleware import CorrelationFilter
from rbee_worker.server.words import in_words

INFERENCE = "/v1/inference"
SECRET = "SECRET-PROMPT-TEXT"  # noqa: S105 - what must not be echoed
STREAM = {"Accept": "text/event-stream"}


def test_the_envelope_lists_every_bad_field(start):
    reply = start().ask(
        "POST", INFERENCE, {"prompt": SECRET, "max_tokens": 0, "temperature": "hot", "stop": [SECRET, ""]}
    )
    assert reply.status == 400
    assert reply.headers["content-type"] == "application/json"
    error = reply.json["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "max_tokens", "INVALID_REQUEST")
    assert [(e["field"], e["constraint"]) for e in reply.json["errors"]] == [
        ("max_tokens", ">= 1"),
        ("temperature", "number"),
        ("stop[1]", "at least 1 character"),
    ]
    assert SECRET.encode() not in reply.body


@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (InvalidRequest("no"), 400, "invalid_request_error"),
        (ContextTooLong("no"), 400, "invalid_request_error"),
        (Conflict("no"), 409, "conflict_error"),
        (QueueFull("no", retry_after=3), 429, "rate_limit_error"),
        (InferenceError("no"), 500, "server_error"),
        (Unavailable("no", retry_after=900), 503, "unavailable_error"),
        (ModelNotLoaded("Model not loaded"), 503, "unavailable_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_before_the_first_byte_in_both_forms(start, refusal, status, kind):
    server = start()
    server.worker.refusal = refusal
    told = in_words(refusal)
    as_json = server.ask("POST", INFERENCE, {"prompt": "p"}, {"Accept": "*/*"})
    as_frames = server.ask("POST", INFERENCE, {"prompt": "p"}, STREAM)
    assert as_json.status == as_frames.status == status
    assert as_json.json["error"] == {"message": told, "type": kind, "param": None, "code": refusal.code}
    assert as_frames.body == (
        f'data: {{"event":"error","code":"{refusal.code}","message":"{told}"}}\n\ndata: [DONE]\n\n'.encode()
    )
    assert as_frames.headers["content-type"] == "text/event-stream"
    for reply in (as_json, as_frames):
        if status in {429, 503}:
            assert 1 <= int(reply.headers["retry-after"]) <= 60
        else:
            assert "retry-after" not in reply.headers


@pytest.mark.parametrize(
    ("accept", "frames"),
    [
        ("text/event-stream", True),
        ("application/json, Text/Event-Stream;q=0.5", True),
        ("text/event-stream;q=0", False),
        ("text/event-stream; q=0.0", False),
        ("text/*", False),
        ("*/*", False),
        ("application/json", False),
        ("", False),
    ],
)
def test_only_a_client_that_names_the_type_gets_frames(start, accept, frames):
    reply = start().ask("POST", INFERENCE, {}, {"Accept": accept})
    assert reply.status == 400
    assert reply.body.endswith(b"[DONE]\n\n") == frames


def test_an_unexpected_error_says_nothing_of_the_inside_and_is_logged(start, caplog):
    server = start()
    server.worker.refusal = ZeroDivisionError(SECRET)
    reply = server.ask("POST", INFERENCE, {"prompt": "p"})
    assert (reply.status, reply.json["error"]["type"]) == (500, "server_error")
    assert SECRET.encode() not in reply.body
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nope", 404, None),
        ("GET", "/v1/ready/", 404, None),
        ("POST", "/", 405, "GET, HEAD"),
        ("GET", INFERENCE, 405, "POST"),
        ("PUT", "/v1/loading", 405, "DELETE, POST"),
        ("OPTIONS", INFERENCE, 405, "POST"),
        ("POST", f"{INFERENCE}/a", 405, "DELETE"),
    ],
)
def test_unknown_routes_and_methods(start, method, path, status, allow):
    reply = start().ask(method, path)
    assert reply.status == status
    assert reply.headers.get("allow") == allow
    assert reply.json["error"]["code"] == ("NOT_FOUND" if status == 404 else "METHOD_NOT_ALLOWED")


@pytest.mark.parametrize("path", ["/", "/health", "/livez", "/readyz", "/v1/ready", "/v1/worker"])
def test_head_is_get_without_a_body(start, path):
    server = start()
    head = server.raw(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert head.startswith(b"HTTP/1.1 200")
    assert head.endswith(b"\r\n\r\n")
    assert server.ask("GET", path).status == 200


def test_bodies_over_the_limit(start):
    server = start(max_body_bytes=1000)
    assert server.ask("POST", "/tokenize", {"text": "x" * 980}).status == 200
    declared = server.ask("POST", "/tokenize", {"text": "x" * 1000})
    assert (declared.status, declared.json["error"]["code"]) == (413, "BODY_TOO_LARGE")
    chunk = b"200\r\n" + b"x" * 0x200 + b"\r\n"
    streamed = server.raw(
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 2 + b"0\r\n\r\n"
    )
    assert streamed.startswith(b"HTTP/1.1 413")
    waiting = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
    assert server.raw(waiting).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_arrives(start):
    server = start(body_seconds=0.2)
    began = time.monotonic()
    reply = server.raw(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
    assert reply.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 5


def test_the_time_for_the_body_is_not_the_time_for_the_stream(start, stand_in):
    gate = threading.Event()
    server = start(stand_in.Worker([stand_in.started(), gate, stand_in.end()]), body_seconds=0.2)
    stream = server.open("POST", INFERENCE, {"prompt": "p"})
    stream.read_until(b"started")
    late = server.raw(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
    assert late.startswith(b"HTTP/1.1 408")  # and it began later
    gate.set()
    assert stream.finish().frames[-1] == b"data: [DONE]"


def test_a_client_that_leaves_in_the_middle_of_its_body(start, caplog):
    caplog.set_level(logging.INFO, "rbee_worker")
    server = start()
    with server.connect() as sock:
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        server.wait(lambda: server.server.server_state.tasks)  # its head was read
        sock.shutdown(socket.SHUT_RDWR)
    server.wait(lambda: any(getattr(r, "status", 0) == 499 for r in caplog.records))
    assert not any(record.exc_info for record in caplog.records)
    assert server.ask("GET", "/livez").status == 200


def test_json_is_taken_whatever_the_content_type_says(start):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert start().ask("POST", "/tokenize", {"text": "x"}, form).status == 200


@pytest.mark.parametrize("name", ["X-Correlation-ID", "x-correlation-id"])
def test_a_correlation_id_is_echoed_on_every_response(start, name):
    server = start()
    given = str(uuid.uuid4())
    for method, path, body in [("GET", "/livez", None), ("GET", "/nope", None), ("POST", INFERENCE, {"prompt": "p"})]:
        reply = server.ask(method, path, body, {name: given})
        assert reply.headers["x-correlation-id"] == reply.headers["x-request-id"] == given


@pytest.mark.parametrize(
    "given", ["", "no-uuid", "{12345678-1234-1234-1234-123456789012}", "1" * 32, quote("a\r\nSet-Cookie: x")]
)
def test_anything_else_gets_a_new_correlation_id(start, given):
    reply = start().ask("GET", "/livez", None, {"X-Correlation-ID": given})
    made = reply.headers["x-correlation-id"]
    assert made != given
    assert str(uuid.UUID(made)) == made


def test_each_request_is_logged_without_its_text(start, caplog):
    caplog.set_level(logging.INFO)
    server = start()
    given = str(uuid.uuid4())
    server.ask("POST", f"{INFERENCE}?q={SECRET}", {"prompt": SECRET, "seed": "x"}, {"X-Correlation-ID": given})
    server.ask("GET", "/a%0d%0ab", None)
    # The line is written when the response is over, which the client may see first.
    server.wait(lambda: sum(r.name == "rbee_worker.access" for r in caplog.records) == 2)
    lines = [r for r in caplog.records if r.name == "rbee_worker.access"]
    assert [(r.getMessage(), r.status) for r in lines] == [(f"POST {INFERENCE}", 400), ("GET /a%0d%0ab", 404)]
    assert lines[0].correlation_id == given
    assert lines[0].ms >= 0
    assert SECRET not in caplog.text


def test_every_line_of_a_request_carries_its_id(start, caplog):
    server = start()
    server.worker.refusal = ZeroDivisionError()
    given = str(uuid.uuid4())
    with caplog.filtering(CorrelationFilter()):
        server.ask("POST", INFERENCE, {"prompt": "p"}, {"X-Correlation-ID": given})
    (line,) = [r for r in caplog.records if r.exc_info]
    assert line.correlation_id == given


OPEN = ["/", "/health", "/livez", "/readyz", "/v1/ready"]
CLOSED = [
    ("GET", "/v1/worker"),
    ("GET", "/nope"),
    ("POST", INFERENCE),
    ("DELETE", f"{INFERENCE}/a"),
    ("POST", "/tokenize"),
]


def test_with_keys_only_health_and_readiness_are_open(start):
    server = start(api_keys=("first", "sécond"))
    for path in OPEN:
        assert server.ask("GET", path).status == 200
    for method, path in CLOSED:
        reply = server.ask(method, path)
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert reply.json["error"]["type"] == "authentication_error"
    assert server.worker.requests == []


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer first", 200),
        ("bearer first", 200),
        ("Bearer second", 200),
        ("Bearer third", 401),
        ("Bearer firs", 401),
        ("Bearer", 401),
        ("Basic first", 401),
        ("first", 401),
    ],
)
def test_bearer_keys(start, header, status):
    assert (
        start(api_keys=("first", "second")).ask("GET", "/v1/worker", None, {"Authorization": header}).status == status
    )


def test_a_key_that_is_not_ascii(start):
    headers = {"Authorization": "Bearer sécond".encode()}
    assert start(api_keys=("sécond",)).ask("GET", "/v1/worker", None, headers).status == 200


def test_other_sites_pages_are_refused_only_where_no_key_protects(start):
    foreign = {"Sec-Fetch-Site": "cross-site"}
    assert start().ask("POST", "/v1/unload", None, foreign).status == 403
    assert start().ask("GET", "/v1/worker", None, foreign).status == 200
    with_key = {**foreign, "Authorization": "Bearer k"}
    assert start(api_keys=("k",)).ask("POST", "/v1/unload", None, with_key).status == 200


def test_tokenizing_much_text_does_not_hold_the_loop(start):
    server = start()
    used = server.worker.the_tokenizer.threads
    assert server.ask("POST", "/tokenize", {"text": "ab"}).json == {"tokens": [97, 98]}
    assert used[-1] is server.worker.thread
    assert len(server.ask("POST", "/tokenize", {"text": "a" * 50_000, "add_special": True}).json["tokens"]) == 50_001
    assert used[-1] is not server.worker.thread
    assert threading.current_thread() not in used


def test_detokenize(start):
    server = start()
    assert server.ask("POST", "/detokenize", {"tokens": [104, 105]}).json == {"text": "hi!"}  # special tokens kept
    beyond = server.ask("POST", "/detokenize", {"tokens": [256]})
    assert (beyond.status, beyond.json["errors"][0]["field"]) == (400, "tokens")


def test_loading_takes_only_the_models_that_were_allowed(start):
    server = start(allow_models=("other",), app_options={"model": "given"})
    body = {"model": "other", "device": "cuda:1", "dtype": "float16", "quantize": "int8", "mmap": True}
    ok = server.ask("POST", "/v1/loading", body)
    assert ok.status == 202
    assert ok.json == {"progress_url": "/v1/loading/progress", "model": "other", "resident_keeps_serving": False}
    assert server.ask("POST", "/v1/loading", {"model": "given"}).status == 202
    assert server.ask("POST", "/v1/loading", {}).json["model"] == "given"
    refused = server.ask("POST", "/v1/loading", {"model": "/etc/passwd"})
    assert (refused.status, refused.json["error"]["type"]) == (403, "permission_error")
    assert server.worker.loads.asked == [
        ("other", LoadSettings(device="cuda:1", dtype="float16", quantize="int8", mmap=True)),
        ("given", LoadSettings()),
        ("given", LoadSettings()),
    ]


def test_loading_the_embedded_default_by_its_name_or_by_none(start):
    server = start()
    for body in ({}, {"model": "SmolLM2-135M-Instruct"}):
        assert server.ask("POST", "/v1/loading", body).json["model"] == "SmolLM2-135M-Instruct"
    assert server.worker.loads.asked == [(None, LoadSettings())] * 2


def test_a_worker_started_without_a_model_asks_for_one(start):
    server = start(app_options={"has_start_model": False})
    assert server.ask("POST", "/v1/loading", {}).status == 400
    assert server.ask("POST", "/v1/loading", {"model": "SmolLM2-135M-Instruct"}).status == 403


def test_unload(start):
    reply = start().ask("POST", "/v1/unload")
    assert (reply.status, reply.json) == (200, {"vram_bytes_freed": 5})


READINESS = [
    ("ready", 0, (200, "healthy", "ready"), {"ready": True, "state": "idle", "model_loaded": True}, 200),
    ("ready", 1, (200, "healthy", "ready"), {"ready": True, "state": "busy", "model_loaded": True}, 200),
    ("draining", 0, (200, "healthy", "draining"), {"ready": False, "state": "draining"}, 503),
    ("no_model", 0, (200, "healthy", "no_model"), {"ready": False, "state": "no_model"}, 503),
    ("failed", 0, (503, "unhealthy", "failed"), {"ready": False, "state": "failed"}, 503),
    (
        "loading",
        0,
        (200, "healthy", "loading"),
        {"ready": False, "state": "loading", "progress_url": "/v1/loading/progress"},
        503,
    ),
]


@pytest.mark.parametrize("case", READINESS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_health_and_readiness_by_state(start, stand_in, case):
    state, running, health, ready, readyz = case
    server = start(stand_in.Worker(state=state))
    server.worker.jobs.running = running
    reply = server.ask("GET", "/health")
    assert (reply.status, reply.json["status"], reply.json["state"]) == health
    assert reply.json["vram_bytes"] == 0
    answer = server.ask("GET", "/v1/ready")
    assert (answer.status, answer.json) == (200, ready)
    probe = server.ask("GET", "/readyz")
    assert (probe.status, "retry-after" in probe.headers) == (readyz, readyz == 503)
    assert server.ask("GET", "/livez").status == 200


def test_a_dead_engine_is_neither_alive_nor_healthy(start):
    server = start()
    server.worker.engine.alive = False
    for path, status in [("/livez", 503), ("/health", 503), ("/readyz", 503), ("/v1/ready", 200)]:
        assert server.ask("GET", path).status == status
    assert server.ask("GET", "/health").json["reason"]
    assert server.ask("GET", "/v1/ready").json == {"ready": False, "state": "failed"}


def test_the_reason_of_a_failed_load_is_in_the_health(start, stand_in):
    server = start(stand_in.Worker(state="failed"))
    server.worker.loads.error = ContextTooLong("too small")
    assert json.loads(server.ask("GET", "/health").body)["reason"] == "too small"


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("127.0.0.1:80", True),
        ("localhost", True),
        ("[::1]:8080", True),
        ("worker.localhost:1", True),
        ("127.9.9.9", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:80", False),
        ("192.0.2.1", False),
        ("", False),
    ],
)
def test_without_a_key_only_this_machines_names_are_answered_to(start, host: str, answered: bool):
    server = start()
    request = f"POST /v1/unload HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    reply = server.raw(request.encode())
    assert reply.startswith(b"HTTP/1.1 200" if answered else b"HTTP/1.1 403")


def test_leave_to_be_unauthenticated_is_leave_to_have_any_name(start):
    reply = start(allow_unauthenticated=True).raw(
        b"POST /v1/unload HTTP/1.1\r\nHost: worker.example\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    )
    assert reply.startswith(b"HTTP/1.1 200")
