"""OpenAI's routes over a real socket: the bytes, the status of a failure, and who leaves when."""

import asyncio
import json
import threading

import pytest
from starlette.requests import Request

from rbee_worker.config import ServerConfig
from rbee_worker.errors import QueueFull, Unavailable
from rbee_worker.events import InferenceFailed
from rbee_worker.server.openai import OpenAI
from rbee_worker.server.streams import Streams
from rbee_worker.worker.job import Job
from tests.unit.server.conftest import SECONDS

from .conftest import started, texts

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BODIES = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, COMPLETIONS: {"prompt": "hi"}}
BOTH = pytest.mark.parametrize("path", BODIES)
FAILED = InferenceFailed(code="INFERENCE_FAILED", message="The step failed.")


def body(path, **fields):
    return BODIES[path] | fields


@BOTH
def test_the_bytes_of_a_stream(start, worker_of, path):
    reply = start(worker_of(texts("é", "\n"))).ask("POST", path, body(path, stream=True))
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.frames[-1] == b"data: [DONE]"
    assert all(frame.startswith(b"data: {") and b"\n" not in frame for frame in reply.frames[:-1])
    assert b"\r" not in reply.body
    assert "é".encode() in reply.body


@BOTH
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [("INFERENCE_FAILED", 500, None), ("DEADLINE_EXCEEDED", 504, "false")])
def test_what_fails_before_its_first_token_is_no_200(start, worker_of, path, stream, failure):
    code, status, retry = failure
    worker = worker_of([started(), 0.02, InferenceFailed(code=code, message="no")])
    reply = start(worker).ask("POST", path, body(path, stream=stream), {"Accept": "text/event-stream"})
    assert reply.status == status
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["error"] == {"message": "no", "type": "server_error", "param": None, "code": code}
    assert reply.headers.get("x-should-retry") == retry


@BOTH
def test_what_fails_later_says_so_in_its_stream(start, worker_of, path):
    reply = start(worker_of([*texts("a")[:-1], 0.02, FAILED])).ask("POST", path, body(path, stream=True))
    assert reply.status == 200
    *_, error, done = reply.frames
    expected = {"message": "The step failed.", "type": "server_error", "param": None, "code": "INFERENCE_FAILED"}
    assert json.loads(error.removeprefix(b"data: ")) == {"error": expected}
    assert done == b"data: [DONE]"
    assert reply.body.count(b"[DONE]") == 1


@BOTH
def test_a_stream_that_waits_long_begins_with_a_keep_alive(start, worker_of, path):
    gate = threading.Event()
    server = start(worker_of([gate, *texts("a")[:-1], FAILED]), keep_alive_seconds=0.1)
    stream = server.open("POST", path, body(path, stream=True))
    assert stream.read_until(b": keep-alive\n\n").startswith(b": keep-alive")
    gate.set()
    assert stream.status == 200
    assert b'"code":"INFERENCE_FAILED"' in stream.finish().frames[-2]


@BOTH
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "expected", [(QueueFull("x", retry_after=3), 429, "rate_limit_exceeded"), (Unavailable("x"), 503, "UNAVAILABLE")]
)
def test_refusals_have_their_status_and_retry_after(start, worker_of, path, stream, expected):
    refusal, status, code = expected
    worker = worker_of(texts("a"))
    worker.refusal = refusal
    reply = start(worker).ask("POST", path, body(path, stream=stream))
    assert (reply.status, reply.json["error"]["code"]) == (status, code)
    assert reply.headers["retry-after"] == ("3" if status == 429 else "5")


@BOTH
@pytest.mark.parametrize("script", [[], [started()], texts("a")[:-1]], ids=["queued", "prompt", "answer"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_all_its_jobs(start, worker_of, path, script, stream):
    worker = worker_of([*script, worker_of.HANG])
    server = start(worker, keep_alive_seconds=0.0)
    client = server.open("POST", path, body(path, stream=stream, n=3))
    if stream and len(script) > 1:
        client.read_until(b'"a"')
    server.wait(lambda: worker.jobs.running == 3)
    client.leave()
    server.wait(lambda: worker.jobs.running == 0)
    assert {request.job_id for request in worker.requests} == set(worker.cancelled)


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_fails_ends_the_others(start, worker_of, stand_in, path, stream):
    worker = worker_of([*texts("a")[:-1], 0.02, FAILED], [*texts("b")[:-1], stand_in.HANG])
    server = start(worker)
    reply = server.ask("POST", path, body(path, stream=stream, n=2))
    assert reply.status == (200 if stream else 500)
    assert b'"code":"INFERENCE_FAILED"' in reply.body
    server.wait(lambda: worker.jobs.running == 0)
    assert worker.cancelled == [worker.requests[1].job_id]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["p", "p" * 20_000], ids=["on the loop", "in a thread"])
def test_a_handler_that_is_cancelled_while_it_submits_leaves_no_job(worker_of, stream, prompt):
    async def scenario():
        worker, loop, left = worker_of(), asyncio.get_running_loop(), threading.Event()
        loops_thread = threading.current_thread()

        def submit_all(requests):
            """As a shutdown may do it, at the worst moment."""
            if threading.current_thread() is loops_thread:
                handler.cancel()
            else:
                loop.call_soon_threadsafe(handler.cancel)
                assert left.wait(SECONDS)
            worker.requests += requests
            return [Job(request.job_id, worker.cancel, request) for request in requests]

        worker.submit_all = submit_all
        content = json.dumps(body(COMPLETIONS, stream=stream, prompt=prompt)).encode()
        sent = iter([{"type": "http.request", "body": content}])

        async def receive():
            return next(sent, None) or await asyncio.Event().wait()

        handlers = OpenAI(worker, ServerConfig(), Streams(worker, ServerConfig()))
        scope = {"type": "http", "headers": [], "path": COMPLETIONS, "client": None}
        handler = asyncio.create_task(handlers.complete(Request(scope, receive)))
        with pytest.raises(asyncio.CancelledError):
            await handler
        left.set()
        async with asyncio.timeout(SECONDS):
            while not worker.requests or worker.cancelled != [request.job_id for request in worker.requests]:
                await asyncio.sleep(0.001)

    asyncio.run(scenario())


def test_choices_that_end_at_different_times_come_as_they_are_made(start, worker_of, stand_in):
    worker = worker_of([*texts("a")[:-1], stand_in.HANG], texts("b"))
    server = start(worker)
    client = server.open("POST", COMPLETIONS, body(COMPLETIONS, stream=True, n=2))
    received = client.read_until(b'"index":1,"text":"","logprobs":null,"finish_reason":"stop"')
    assert b"[DONE]" not in received
    client.leave()


def test_a_cancelled_job_is_no_short_answer(start, worker_of, stand_in):
    worker = worker_of([*texts("a")[:-1], stand_in.HANG])
    server = start(worker)
    client = server.open("POST", CHAT, body(CHAT, stream=True))
    client.read_until(b'"a"')
    response_id = json.loads(client.body.split(b"\n\n")[0].removeprefix(b"data: "))["id"]
    assert server.ask("DELETE", f"/v1/inference/{response_id}").status == 204
    reply = client.finish()
    assert b'"code":"CANCELLED"' in reply.frames[-2]
    assert b'"finish_reason":"' not in reply.body


def test_a_shutdown_ends_an_answer_with_an_error(start, worker_of, stand_in):
    worker = worker_of([*texts("a")[:-1], stand_in.HANG])
    server = start(worker)
    client = server.open("POST", CHAT, body(CHAT, stream=True))
    client.read_until(b'"a"')
    worker.state = "draining"
    worker.cancel(worker.requests[0].job_id)
    assert b'"type":"unavailable_error"' in client.finish().frames[-2]


@BOTH
def test_bad_bodies_list_every_field(start, worker_of, path):
    reply = start(worker_of(texts("a"))).ask("POST", path, body(path, stream=True, n=0, temperature=3, best_of=2))
    assert reply.status == 400
    assert {error["field"] for error in reply.json["errors"]} == {"n", "temperature", "best_of"}
    assert reply.json["error"]["type"] == "invalid_request_error"


@BOTH
@pytest.mark.parametrize(
    ("model", "status"), [("m", 200), ("alias", 200), ("", 200), (None, 200), ("gpt-4o", 404), ("M", 404)]
)
def test_names_of_the_model(start, worker_of, path, model, status):
    server = start(worker_of(texts("a")), served_model_names=("first", "alias"))
    reply = server.ask("POST", path, body(path, model=model))
    assert reply.status == status
    if status == 200:
        assert reply.json["model"] == "first"
    else:
        assert reply.json["error"]["code"] == "model_not_found"
        assert "first" in reply.json["error"]["message"]


def test_models_by_all_their_names(start, worker_of):
    server = start(worker_of(texts("a")), served_model_names=("first", "org/second"))
    listed = server.ask("GET", "/v1/models").json
    assert listed["object"] == "list"
    assert [(m["id"], m["status"], m["max_model_len"]) for m in listed["data"]] == [
        ("first", "ready", 64),
        ("org/second", "ready", 64),
    ]
    for name in ("org/second", "m"):
        assert server.ask("GET", f"/v1/models/{name}").json["id"] == name
    missing = server.ask("GET", "/v1/models/other")
    assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")


def test_held_requests_begin_when_the_load_has_ended(start, worker_of):
    worker = worker_of(texts("a"))
    worker.changing = True
    served, worker.engine.model = worker.engine.model, None

    async def settled():
        while worker.changing:
            await asyncio.sleep(0.005)

    worker.settled = settled
    server = start(worker, hold_requests=True, keep_alive_seconds=0.1, max_queue=1)
    held = server.open("POST", CHAT, body(CHAT, stream=True, model="m"))
    held.read_until(b": keep-alive\n\n")
    full = server.ask("POST", CHAT, body(CHAT, stream=True))
    assert (full.status, worker.requests) == (429, [])
    worker.engine.model = served
    worker.changing = False
    assert b'"content":"a"' in held.finish().body
    assert len(worker.requests) == 1


def test_a_held_request_that_fails_soon_has_its_status(start, worker_of):
    worker = worker_of(texts("a"))
    worker.changing, worker.refusal = True, Unavailable("The load failed.")

    async def settled():
        worker.changing = False

    worker.settled = settled
    assert start(worker, hold_requests=True).ask("POST", CHAT, body(CHAT, stream=True)).status == 503
