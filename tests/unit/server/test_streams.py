"""Streams over a real socket: the bytes, the keep-alive, and who leaves when."""

import asyncio
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest

from rbee_worker.config import ServerConfig
from rbee_worker.errors import InferenceError, QueueFull
from rbee_worker.events import LoadingToVram, Ready, Resolving, to_json
from rbee_worker.server.http.envelope import inference_failed
from rbee_worker.server.native.frames import inference_frames
from rbee_worker.server.streams import Streams
from tests.unit.server.test_sse import HTTP, Client

REQUEST = {"prompt": "p"}
PROGRESS = "/v1/loading/progress"


def frame(event):
    return b"data: " + to_json(event).encode() + b"\n\n"


def counts(seq, loaded=1):
    return LoadingToVram(
        seq=seq,
        elapsed_seconds=0.5,
        layers_loaded=loaded,
        layers_total=4,
        vram_mb=1,
        vram_total_mb=2,
        device="cpu",
        bytes_loaded=1,
        bytes_total=4,
        bytes_per_second=1,
    )


def ready(seq, load_report=None):
    return Ready(seq=seq, elapsed_seconds=1.0, report=load_report)


def dechunked(raw):
    head, _, rest = raw.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
    return head, body


def test_bytes_of_an_inference_stream(start, stand_in):
    events = [stand_in.started(), stand_in.token(0, "é👋\n"), stand_in.token(1), stand_in.end()]
    server = start(stand_in.Worker([events[0], events[1], 0.02, events[2], events[3]]))
    raw = server.raw(
        b"POST /v1/inference HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b'Content-Length: 14\r\n\r\n{"prompt":"p"}'
    )
    head, body = dechunked(raw)
    assert body == b"".join(map(frame, events)) + b"data: [DONE]\n\n"
    assert "é👋".encode() in body
    assert b"\r" not in body
    lines = head.lower().split(b"\r\n")
    assert lines[0] == b"http/1.1 200 ok"
    assert b"content-type: text/event-stream" in lines
    assert b"cache-control: no-store" in lines
    assert b"x-accel-buffering: no" in lines


def test_each_frame_leaves_as_it_is_made(start, stand_in):
    server = start(stand_in.Worker([stand_in.started(), stand_in.token(0), stand_in.HANG]))
    stream = server.open("POST", "/v1/inference", REQUEST)
    stream.read_until(frame(stand_in.token(0)))
    assert b"[DONE]" not in stream.body
    stream.leave()


def test_keep_alives_come_in_silence(start, stand_in):
    server = start(stand_in.Worker([stand_in.started(), stand_in.HANG]), keep_alive_seconds=0.05)
    stream = server.open("POST", "/v1/inference", REQUEST)
    body = stream.read_until(b": keep-alive\n\n" * 3)
    assert body.replace(b": keep-alive\n\n", b"") == frame(stand_in.started())
    stream.leave()


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (InferenceError("step 3 failed"), "INFERENCE_FAILED", "step 3 failed"),
        (ZeroDivisionError("inside"), "INTERNAL_ERROR", "The worker failed; its log says why."),
    ],
)
def test_an_error_in_mid_stream_is_a_frame_and_then_done(start, stand_in, failure, code, message):
    server = start(stand_in.Worker([stand_in.started(), stand_in.token(0), failure]))
    frames = server.ask("POST", "/v1/inference", REQUEST).frames
    assert frames[2] == f'data: {{"event":"error","code":"{code}","message":"{message}"}}'.encode()
    assert frames[3:] == [b"data: [DONE]"]


def test_a_source_that_just_ends_gets_an_error_and_done(start, stand_in):
    server = start(stand_in.Worker([stand_in.started()]))
    frames = server.ask("POST", "/v1/inference", REQUEST).frames
    assert b'"event":"error"' in frames[1]
    assert frames[2:] == [b"data: [DONE]"]


def test_nothing_follows_the_terminal_event_but_done(start, stand_in):
    server = start(stand_in.Worker([stand_in.started(), stand_in.end(), stand_in.token(5), stand_in.end()]))
    frames = server.ask("POST", "/v1/inference", REQUEST).frames
    assert frames[1:] == [frame(stand_in.end())[:-2], b"data: [DONE]"]
    server.wait(lambda: server.worker.closed_sources == 1)
    assert server.worker.cancelled == []  # the job had ended by itself


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_client_that_leaves_cancels_its_job_at_once(start, stand_in, how):
    server = start(stand_in.Worker([stand_in.started(), stand_in.HANG]))
    stream = server.open("POST", "/v1/inference", {**REQUEST, "job_id": "a"})
    stream.read_until(b"started")
    assert server.worker.cancelled == []
    if how == "rst":
        stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    left_at = time.monotonic()
    stream.leave()
    server.wait(lambda: server.worker.cancelled == ["a"])
    assert time.monotonic() - left_at < 1
    server.wait(lambda: server.worker.closed_sources == 1)


def test_a_client_that_leaves_before_the_first_event_cancels_its_job(start, stand_in):
    server = start(stand_in.Worker([stand_in.HANG]))
    stream = server.open("POST", "/v1/inference", {**REQUEST, "job_id": "a"})
    server.wait(lambda: server.worker.requests)
    stream.leave()
    server.wait(lambda: server.worker.cancelled == ["a"])


def test_delete_ends_the_stream_and_is_idempotent(start, stand_in):
    server = start(stand_in.Worker([stand_in.started(), stand_in.HANG]))
    stream = server.open("POST", "/v1/inference", {**REQUEST, "job_id": "a/b c"})
    stream.read_until(b"started")
    reply = server.ask("DELETE", "/v1/inference/a%2Fb%20c")
    assert (reply.status, reply.body) == (204, b"")
    frames = stream.finish().frames
    assert b'"stop_reason":"cancelled"' in frames[-2]
    assert frames[-1] == b"data: [DONE]"
    assert server.ask("DELETE", "/v1/inference/a%2Fb%20c").status == 204
    assert server.ask("DELETE", "/v1/inference/never-was").status == 204


def test_a_client_that_does_not_read_is_let_go(start, stand_in):
    big = [stand_in.token(i, "x" * 60_000) for i in range(400)]
    server = start(stand_in.Worker([stand_in.started(), *big, stand_in.HANG]), send_timeout_seconds=0.3)
    stream = server.open("POST", "/v1/inference", {**REQUEST, "job_id": "a"})
    server.wait(lambda: server.worker.cancelled == ["a"])
    stream.leave()


def test_progress_stream(start, stand_in):
    events = [Resolving(seq=0, elapsed_seconds=0.0, model="m"), counts(1), counts(2, 4), ready(3)]
    server = start(stand_in.Worker(progress=[*events[:2], 0.02, *events[2:]]))
    reply = server.ask("GET", PROGRESS)
    assert reply.body == b"".join(map(frame, events)) + b"data: [DONE]\n\n"
    assert reply.headers["content-type"] == "text/event-stream"
    # Late: the stand-in plays the same again, as a snapshot would be.
    assert server.ask("GET", PROGRESS).frames[-2:] == [frame(events[-1])[:-2], b"data: [DONE]"]


def test_a_failed_progress_source_is_numbered_on(start, stand_in):
    server = start(stand_in.Worker(progress=[counts(4), ZeroDivisionError()]))
    frames = server.ask("GET", PROGRESS).frames
    assert frames[1].startswith(b'data: {"stage":"error","code":"INTERNAL_ERROR"')
    assert frames[1].endswith(b'"seq":5,"elapsed_seconds":0.5}')
    assert frames[2:] == [b"data: [DONE]"]


def test_a_watcher_that_leaves_leaves_the_load_alone(start, stand_in):
    server = start(stand_in.Worker(progress=[counts(0), stand_in.HANG], state="loading"))
    stays, leaves = server.open("GET", PROGRESS), server.open("GET", PROGRESS)
    stays.read_until(b"loading_to_vram")
    leaves.read_until(b"loading_to_vram")
    leaves.leave()
    server.wait(lambda: server.worker.loads.watchers == 1)
    assert not server.worker.loads.cancelled.is_set()
    assert server.ask("DELETE", "/v1/loading").status == 202
    assert [b'"stage":"cancelled"' in f for f in stays.finish().frames[-2:]] == [True, False]
    server.worker.loads.running = False
    assert server.ask("DELETE", "/v1/loading").status == 404


def test_head_of_a_progress_stream_opens_none(start, stand_in):
    server = start(stand_in.Worker(progress=[counts(0), stand_in.HANG]))
    head = server.raw(f"HEAD {PROGRESS} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert head.startswith(b"HTTP/1.1 200")
    assert b"content-type: text/event-stream" in head
    assert head.endswith(b"\r\n\r\n")


def test_no_load_to_speak_of_is_503(start, stand_in):
    reply = start(stand_in.Worker(state="no_model")).ask("GET", PROGRESS)
    assert reply.status == 503
    assert reply.json["error"]["type"] == "unavailable_error"
    assert 1 <= int(reply.headers["retry-after"]) <= 60


def test_a_request_is_held_from_the_moment_it_is_taken(stand_in):
    """Two that come at once are two, though neither stream has begun; one that is left gives its place back."""

    async def scenario():
        worker = stand_in.Worker()
        worker.changing, worker.settled = True, asyncio.Event().wait
        streams = Streams(worker, ServerConfig(hold_requests=True, max_queue=1))

        def hold():
            return streams.of_jobs(0, lambda: worker.submit(None), inference_frames, inference_failed)

        first = await hold()
        with pytest.raises(QueueFull):
            await hold()
        await first.aclose()
        for _ in range(5):  # the loop hears of it
            await asyncio.sleep(0)
        await (await hold()).aclose()
        assert worker.requests == []

    asyncio.run(scenario())


@pytest.mark.parametrize("refused", [False, True])
def test_a_held_job_whose_client_leaves_while_it_is_submitted_is_cancelled(refused, caplog):
    submitting, go_on, submitted, cancelled = (threading.Event() for _ in range(4))

    def submit():
        submitting.set()
        assert go_on.wait(60)
        submitted.set()
        if refused:
            raise InferenceError("refused")
        return SimpleNamespace(cancel=cancelled.set)

    def never(_):
        raise AssertionError("nobody reads its frames")

    async def settled():
        """A load that has just ended."""

    async def leave():
        streams = Streams(SimpleNamespace(changing=True, settled=settled), ServerConfig(hold_requests=True))
        stream = await streams.of_jobs(10**6, submit, never, inference_failed)
        client = Client()
        response = asyncio.create_task(stream(HTTP, client.receive, client.send))
        assert await asyncio.to_thread(submitting.wait, 60)
        client.leave()
        await response
        go_on.set()
        assert await asyncio.to_thread(submitted.wait, 60)
        assert refused or await asyncio.to_thread(cancelled.wait, 60)
        await asyncio.sleep(0)

    asyncio.run(leave())
    assert cancelled.is_set() is not refused
    assert caplog.text == ""
