"""The client against a server on a real socket that answers from a script."""

import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from rbee_worker import errors
from rbee_worker.client import WorkerClient, inference_body
from rbee_worker.config import GenerationRequest, GrammarSpec, LoadSettings, Message, SamplingParams
from rbee_worker.errors import (
    Conflict,
    ContextTooLong,
    Forbidden,
    InferenceError,
    InvalidRequest,
    ModelNotFound,
    ModelNotLoaded,
    NotFound,
    OutOfMemory,
    QueueFull,
    RbeeError,
    Unauthorized,
    Unavailable,
    WorkerUnreachable,
    error_of,
)
from rbee_worker.events import Event, InferenceFailed, LoadFailed, Started
from rbee_worker.server.native.bodies import InferenceBody
from tests.unit.fake_worker import DONE, FakeWorker, answer, frames, refused, running, stream
from tests.unit.samples import JOB, LOAD, STARTED, layers

REQUEST = GenerationRequest(prompt="hi", job_id="job-1")


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    with running() as fake:
        yield fake


@pytest.fixture
def client(worker: FakeWorker) -> Iterator[WorkerClient]:
    with WorkerClient(worker.addr, "the-key") as client:
        yield client


# -- streams


def test_events_come_back_as_they_were_sent(worker: FakeWorker, client: WorkerClient):
    text = ": keep-alive\n\n" + frames(*JOB)
    # Cut anywhere, also within a character of several bytes: no event is lost or torn.
    worker.answers["POST /v1/inference"] = stream(*(text[n : n + 7] for n in range(0, len(text), 7)))
    assert list(client.generate(REQUEST)) == JOB
    call = worker.calls[0]
    assert call.body == {"job_id": "job-1", "prompt": "hi"}
    assert call.headers["Accept"] == "text/event-stream"
    assert call.headers["Authorization"] == "Bearer the-key"
    assert worker.asked() == ["POST /v1/inference"]


def test_events_are_not_held_back(worker: FakeWorker, client: WorkerClient):
    gate = threading.Semaphore(0)
    worker.answers["POST /v1/inference"] = stream(*(frames(event, done=False) for event in JOB), DONE, gate=gate)
    events = client.generate(REQUEST)
    for event in JOB:
        gate.release()
        assert next(events) == event  # the next one has not been sent
    gate.release()
    assert list(events) == []


def test_load_asks_then_follows(worker: FakeWorker, client: WorkerClient):
    worker.answers["POST /v1/loading"] = answer(202, {"progress_url": "/v1/loading/progress"})
    worker.answers["GET /v1/loading/progress"] = stream(frames(*LOAD))
    assert list(client.load("m.gguf", LoadSettings(device="cpu"))) == LOAD
    assert worker.asked() == ["POST /v1/loading", "GET /v1/loading/progress"]
    assert worker.calls[0].body == {"model": "m.gguf", "device": "cpu"}


def test_load_is_asked_for_at_the_call(worker: FakeWorker, client: WorkerClient):
    worker.answers["POST /v1/loading"] = answer(202, {})
    client.load(None)
    assert worker.asked() == ["POST /v1/loading"]
    assert worker.calls[0].body == {}


def test_without_a_key_none_is_sent(worker: FakeWorker):
    worker.answers["DELETE /v1/loading"] = answer(202, {})
    with WorkerClient(worker.addr) as client:
        assert client.cancel_load()
    assert "Authorization" not in worker.calls[0].headers


def test_a_path_in_the_url_is_kept(worker: FakeWorker):
    worker.answers["DELETE /rbee/v1/loading"] = answer(202, {})
    with WorkerClient(f"http://{worker.addr}/rbee/") as client:
        assert client.cancel_load()


def test_cancel_load_that_is_refused(worker: FakeWorker, client: WorkerClient):
    worker.answers["DELETE /v1/loading"] = refused(401, "UNAUTHORIZED", "No key.")
    with pytest.raises(Unauthorized, match=r"No key\."):
        client.cancel_load()


def test_a_connection_that_is_reset_is_lost(worker: FakeWorker, client: WorkerClient):
    def reset(handler: BaseHTTPRequestHandler) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())
        handler.close_connection = True

    worker.answers["DELETE /v1/loading"] = reset
    with pytest.raises(WorkerUnreachable, match=rf"^The worker at http://{worker.addr} was lost \(ReadError"):
        client.cancel_load()


def test_any_json_object_is_asked_for_as_a_schema():
    request = GenerationRequest(prompt="p", sampling=SamplingParams(grammar=GrammarSpec("json_object")))
    assert inference_body(request, "j")["json_schema"] == {"type": "object"}


def test_cancel_load_when_nothing_loads(worker: FakeWorker, client: WorkerClient):
    worker.answers["DELETE /v1/loading"] = refused(404, "NOT_FOUND", "Nothing is being loaded.")
    assert not client.cancel_load()


# -- cancelling


@pytest.mark.parametrize("job_id", ["job-1", "a/b c?"])
def test_closing_the_iterator_cancels_the_job(worker: FakeWorker, client: WorkerClient, job_id: str):
    gate = threading.Semaphore(1)  # of the job's events, one is sent
    worker.answers["POST /v1/inference"] = stream(*(frames(event, done=False) for event in JOB), DONE, gate=gate)
    worker.answers["DELETE *"] = answer(204)
    events = client.generate(GenerationRequest(prompt="hi", job_id=job_id))
    assert isinstance(next(events), Started)
    events.close()  # type: ignore[attr-defined]
    gate.release(len(JOB))
    quoted = {"job-1": "job-1", "a/b c?": "a%2Fb%20c%3F"}[job_id]
    assert worker.asked() == ["POST /v1/inference", f"DELETE /v1/inference/{quoted}"]


def test_an_interrupt_within_cancels_the_job(worker: FakeWorker, client: WorkerClient, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> Iterator[Event]:
        yield STARTED
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "_stream", interrupted)
    worker.answers["DELETE *"] = answer(204)
    with pytest.raises(KeyboardInterrupt):
        list(client.generate(REQUEST))
    assert worker.asked() == ["DELETE /v1/inference/job-1"]


def test_a_finished_job_is_not_cancelled(worker: FakeWorker, client: WorkerClient):
    worker.answers["POST /v1/inference"] = stream(frames(*JOB))
    events = client.generate(REQUEST)
    for _ in JOB:
        next(events)
    events.close()  # type: ignore[attr-defined]
    assert worker.asked() == ["POST /v1/inference"]


def test_a_job_gets_an_id_that_it_can_be_cancelled_by(worker: FakeWorker, client: WorkerClient):
    worker.answers["POST /v1/inference"] = stream(frames(*JOB))
    list(client.generate(GenerationRequest(prompt="hi")))
    assert len(worker.calls[0].body["job_id"]) == 36


# -- what the worker refuses

TWO_FRAMES = frames(InferenceFailed(code="QUEUE_FULL", message="64 requests wait."))


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (stream(TWO_FRAMES, status=429), QueueFull, "64 requests wait."),
        (refused(503, "INFERENCE_FAILED", "Model not loaded"), ModelNotLoaded, "Model not loaded"),
        (refused(503, "UNAVAILABLE", "loading", Retry_After="7"), Unavailable, "loading"),
        (refused(400, "CONTEXT_TOO_LONG", "9000 tokens"), ContextTooLong, "9000 tokens"),
        (refused(400, "context_too_long", "9000 tokens"), ContextTooLong, "9000 tokens"),
        (refused(400, "INVALID_REQUEST", "top_p is 2"), InvalidRequest, "top_p is 2"),
        (refused(401, "UNAUTHORIZED", "no key"), Unauthorized, "no key"),
        (refused(409, "CONFLICT", "job-1 runs"), Conflict, "job-1 runs"),
        (refused(409, "", "of another kind"), Conflict, "of another kind"),
        (refused(404, "unheard_of", "gone"), NotFound, "gone"),
        (refused(500, "unheard_of", "broken"), RbeeError, "broken"),
    ],
)
def test_refusals_before_the_first_event(
    worker: FakeWorker, client: WorkerClient, reply: Callable[..., None], kind: type[RbeeError], message: str
):
    worker.answers["POST /v1/inference"] = reply
    with pytest.raises(RbeeError) as caught:
        next(client.generate(REQUEST))
    assert type(caught.value) is kind
    assert caught.value.message == message
    assert worker.asked() == ["POST /v1/inference"]


def test_retry_after_and_the_hint_about_the_key(worker: FakeWorker, client: WorkerClient):
    worker.answers["POST /v1/loading"] = refused(503, "UNAVAILABLE", "draining", Retry_After="7")
    with pytest.raises(Unavailable) as unavailable:
        client.load("m")
    assert unavailable.value.retry_after == 7
    worker.answers["POST /v1/loading"] = refused(401, "UNAUTHORIZED", "The API key is wrong.")
    with pytest.raises(Unauthorized) as unauthorized:
        client.load("m")
    assert "--api-key" in (unauthorized.value.hint or "")


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (refused(409, "CONFLICT", "another load runs"), Conflict),
        (refused(403, "FORBIDDEN", "not that model"), Forbidden),
        (refused(404, "MODEL_NOT_FOUND", "m: no such file"), ModelNotFound),
    ],
)
def test_loads_that_are_refused(
    worker: FakeWorker, client: WorkerClient, reply: Callable[..., None], kind: type[RbeeError]
):
    worker.answers["POST /v1/loading"] = reply
    with pytest.raises(kind):
        client.load("m")


def test_errors_within_a_stream_are_seen_then_raised(worker: FakeWorker, client: WorkerClient):
    failed = LoadFailed(code="OUT_OF_MEMORY", message="needs 8 GiB", seq=2, elapsed_seconds=1.0)
    worker.answers["GET /v1/loading/progress"] = stream(frames(layers(1, 1), failed))
    seen: list[Event] = []
    with pytest.raises(OutOfMemory, match="needs 8 GiB") as caught:
        seen.extend(client.progress())
    assert caught.value.exit_code == 5
    events = client.progress()
    assert [next(events), next(events)] == [layers(1, 1), failed]

    step = InferenceFailed(code="INFERENCE_FAILED", message="a step failed")
    worker.answers["POST /v1/inference"] = stream(frames(STARTED, step))
    job = client.generate(REQUEST)
    assert [next(job), next(job)] == [STARTED, step]
    with pytest.raises(InferenceError, match="a step failed") as inference:
        next(job)
    assert type(inference.value) is InferenceError


@pytest.mark.parametrize(
    "kind", [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, RbeeError) and "code" in vars(k)]
)
def test_every_code_names_its_class(kind: type[RbeeError]):
    assert type(error_of(kind.code, "m", status=kind.http_status)) is kind
    assert type(error_of(kind.code, "m")) is kind


def test_the_history_of_loads(worker: FakeWorker, client: WorkerClient):
    loads = [{"model": "m", "outcome": "ready", "new": 1}]
    worker.answers["GET /v1/loading/history"] = answer(200, {"loads": loads})
    assert client.history() == loads
    worker.answers["GET /v1/loading/history"] = refused(401, "UNAUTHORIZED", "no key")
    with pytest.raises(Unauthorized):
        client.history()
    for odd in ({}, [], {"loads": 1}, {"loads": ["x"]}, "text"):
        worker.answers["GET /v1/loading/history"] = answer(200, odd)
        assert_unreachable(worker, client.history, "no history of loads")


# -- what goes wrong on the way


def assert_unreachable(fake: FakeWorker, act: Callable[[], object], *words: str) -> None:
    with pytest.raises(WorkerUnreachable) as caught:
        act()
    assert caught.value.exit_code == 6
    for word in (fake.addr, *words):
        assert word in caught.value.message


@pytest.mark.parametrize("events", [JOB[:2], JOB])
@pytest.mark.parametrize("cut", [False, True])
def test_a_stream_without_done_was_cut(worker: FakeWorker, client: WorkerClient, events: list[Event], cut: bool):
    worker.answers["POST /v1/inference"] = stream(frames(*events, done=False), cut=cut)
    seen: list[Event] = []
    assert_unreachable(worker, lambda: [seen.append(event) for event in client.generate(REQUEST)])
    assert seen == events


def test_a_cut_stream_says_so(worker: FakeWorker, client: WorkerClient):
    worker.answers["GET /v1/loading/progress"] = stream(frames(*LOAD[:3], done=False))
    assert_unreachable(worker, lambda: list(client.progress()), "was cut before the last event")


@pytest.mark.parametrize(
    "data", ["{", "[]", "1", '{"event":"unheard_of"}', '{"event":"token"}', '{"stage":"ready","seq":1,"report":{}}']
)
def test_frames_that_are_no_events(worker: FakeWorker, client: WorkerClient, data: str):
    worker.answers["POST /v1/inference"] = stream(f"data: {data}\n\n", DONE)
    assert_unreachable(worker, lambda: list(client.generate(REQUEST)))


def test_events_of_the_other_stream(worker: FakeWorker, client: WorkerClient):
    worker.answers["POST /v1/inference"] = stream(frames(*LOAD))
    assert_unreachable(worker, lambda: list(client.generate(REQUEST)), "Resolving event among the inference events")
    worker.answers["GET /v1/loading/progress"] = stream(frames(*JOB))
    assert_unreachable(worker, lambda: list(client.progress()), "Started event among the loading events")


@pytest.mark.parametrize(
    "reply",
    [
        answer(404, "<html>nginx</html>"),
        answer(502),
        answer(200, "<html>hello</html>"),
        answer(500, ["error"]),
        answer(500, {"error": "text"}),
        answer(301, None, Location="http://elsewhere/"),
        stream("data: {}\n\n", status=500),
        stream(status=500),
    ],
)
def test_another_program_at_the_address(worker: FakeWorker, client: WorkerClient, reply: Callable[..., None]):
    worker.answers["POST /v1/inference"] = reply
    assert_unreachable(worker, lambda: list(client.generate(REQUEST)))


def test_nobody_at_the_address():
    with socket.socket() as taken:  # bound, never listening: refused for certain
        taken.bind(("127.0.0.1", 0))
        addr = f"127.0.0.1:{taken.getsockname()[1]}"
        with WorkerClient(addr) as client, pytest.raises(WorkerUnreachable, match="refused") as caught:
            client.load("m")
    assert addr in caught.value.message
    assert caught.value.hint is not None


def test_a_host_that_does_not_exist():
    with WorkerClient("http://worker.invalid:1") as client, pytest.raises(WorkerUnreachable, match=r"worker\.invalid"):
        list(client.progress())


def test_silence_ends():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        addr = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            WorkerClient(addr, silence_seconds=0.2) as client,
            pytest.raises(WorkerUnreachable, match=r"nothing for 0\.2 s"),
        ):
            list(client.progress())


def test_what_speaks_no_http():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
                connection.recv(65536)

        thread = threading.Thread(target=greet)
        thread.start()
        addr = f"127.0.0.1:{server.getsockname()[1]}"
        with WorkerClient(addr) as client, pytest.raises(WorkerUnreachable, match="HTTP"):
            list(client.progress())
        thread.join()


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(worker: FakeWorker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    worker.answers["DELETE /v1/loading"] = answer(202, {})
    with WorkerClient(worker.addr) as client:
        assert client.cancel_load()


def test_addresses_are_checked_at_once():
    with pytest.raises(InvalidRequest):
        WorkerClient("::1:8080")


# -- the request's body


def test_only_what_differs_is_sent():
    sampling = SamplingParams(temperature=0.0, stop=("a", "b"), seed=0, max_tokens=5)
    assert inference_body(GenerationRequest(prompt="p", sampling=sampling), "j") == {
        "job_id": "j",
        "prompt": "p",
        "temperature": 0.0,
        "stop": ("a", "b"),
        "seed": 0,
        "max_tokens": 5,
    }


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(logit_bias=((7, -1.0),), logprobs=2, prompt_logprobs=0, skip_special_tokens=False),
        SamplingParams(grammar=GrammarSpec("json_schema", '{"type": "object"}')),
        SamplingParams(grammar=GrammarSpec("regex", "a+")),
        SamplingParams(grammar=GrammarSpec("lark", "start: /a/")),
    ],
)
def test_what_is_sent_is_read_as_it_was_meant(sampling: SamplingParams):
    request = GenerationRequest(prompt="p", sampling=sampling, job_id="j", prompt_progress=True, timeout_seconds=3.0)
    sent = json.loads(json.dumps(inference_body(request, "j")))
    assert InferenceBody.parse(sent).to_request() == request


def test_a_prompt_for_the_template_goes_as_a_message():
    assert inference_body(GenerationRequest(prompt="p", raw=False), "j")["messages"] == [
        {"role": "user", "content": "p"}
    ]
    messages = (Message(role="system", content="s"), Message(role="user", content="u"))
    body = inference_body(GenerationRequest(messages=messages, raw=False), "j")
    assert body == {"job_id": "j", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
