"""The end of a server: draining, the second signal, the load that fails."""

import contextvars
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from rbee_worker.config import EngineConfig, ServerConfig
from rbee_worker.errors import DeviceUnavailable, InvalidRequest, OutOfMemory, Unavailable
from rbee_worker.events import LoadFailed, Resolving
from rbee_worker.server import run
from rbee_worker.server.http.middleware import CorrelationFilter, correlation_id

PROGRESS = "/v1/loading/progress"
REQUEST = {"prompt": "p"}


def join(server):
    server.thread.join(10)
    assert not server.thread.is_alive()


def test_a_signal_lets_running_streams_finish(start, stand_in):
    gate, later = threading.Event(), map(stand_in.token, range(1, 10))
    script = [stand_in.started(), stand_in.token(0), gate, *later, stand_in.end()]
    server = start(stand_in.Worker(script), shutdown_grace_seconds=10)
    stream = server.open("POST", "/v1/inference", REQUEST)
    stream.read_until(b"token")
    server.server.handle_exit(signal.SIGTERM, None)
    server.wait(lambda: server.worker.state == "draining")
    # Still answering: the streams go on, and health says what is going on.
    assert server.ask("GET", "/health").json["state"] == "draining"
    gate.set()
    frames = stream.finish().frames
    assert b'"i":9' in frames[-3]
    assert b'"stop_reason":"max_tokens"' in frames[-2]
    assert frames[-1] == b"data: [DONE]"
    join(server)
    assert server.worker.calls == {"start": 1, "drain": 1, "close": 1}
    assert server.server.exit_code == 0
    assert server.server._captured_signals == []  # uvicorn would raise these again


def test_what_a_server_says_of_its_end_is_not_of_the_request_that_the_signal_interrupted(start, caplog, monkeypatch):
    monkeypatch.setattr(caplog.handler, "filters", [CorrelationFilter()])
    caplog.set_level("INFO")
    server = start()
    context = contextvars.copy_context()
    context.run(correlation_id.set, "of-a-request")
    context.run(server.server.handle_exit, signal.SIGTERM, None)  # a handler runs in whatever runs on its thread
    join(server)
    (said,) = [record for record in caplog.records if "shutting down" in record.message]
    assert not hasattr(said, "correlation_id")


def test_after_the_grace_streams_end_with_their_terminal_frame(start, stand_in):
    worker = stand_in.Worker([stand_in.started(), stand_in.HANG], progress=[stand_in.HANG], state="loading")
    server = start(worker, shutdown_grace_seconds=0.3)
    stream, watcher = server.open("POST", "/v1/inference", REQUEST), server.open("GET", PROGRESS)
    stream.read_until(b"started")
    server.wait(lambda: worker.loads.watchers == 1)
    began = time.monotonic()
    server.server.handle_exit(signal.SIGINT, None)
    ended = watcher.finish().frames
    assert time.monotonic() - began < 0.3  # a load is cancelled at once
    assert b'"stage":"cancelled"' in ended[0]
    assert ended[1:] == [b"data: [DONE]"]
    frames = stream.finish().frames
    assert time.monotonic() - began >= 0.3
    assert b'"stop_reason":"cancelled"' in frames[-2]
    assert frames[-1] == b"data: [DONE]"
    join(server)


def test_a_stuck_stream_is_told_all_the_same(start, stand_in, monkeypatch):
    monkeypatch.setattr(run, "FLUSH_SECONDS", 0.2)
    server = start(stand_in.Worker([stand_in.started(), 60.0]), shutdown_grace_seconds=0)
    stream = server.open("POST", "/v1/inference", REQUEST)
    stream.read_until(b"started")
    server.server.handle_exit(signal.SIGTERM, None)
    frames = stream.finish().frames
    assert b'"code":"UNAVAILABLE"' in frames[-2]
    assert frames[-1] == b"data: [DONE]"
    join(server)


def test_a_second_signal_ends_the_process_at_once(start, stand_in, monkeypatch):
    codes = []
    monkeypatch.setattr(run.os, "_exit", codes.append)
    server = start(stand_in.Worker([stand_in.started(), stand_in.HANG]), shutdown_grace_seconds=0.3)
    stream = server.open("POST", "/v1/inference", REQUEST)
    stream.read_until(b"started")
    server.server.handle_exit(signal.SIGTERM, None)
    assert codes == []
    server.server.handle_exit(signal.SIGTERM, None)
    server.server.handle_exit(signal.SIGINT, None)
    assert codes == [143, 130]
    stream.finish()
    join(server)


def failing_worker(stand_in):
    failure = LoadFailed(seq=1, elapsed_seconds=0.1, code="OUT_OF_MEMORY", message="too big")
    worker = stand_in.Worker(progress=[Resolving(seq=0, elapsed_seconds=0.0, model="m"), 0.3, failure])
    worker.loads.error = OutOfMemory("too big")
    return worker


def test_exit_on_load_error_ends_with_its_code_after_the_watchers_have_it(start, stand_in):
    begun = []
    server = start(failing_worker(stand_in), exit_on_load_error=True, first_load=lambda: begun.append(1))
    frames = server.ask("GET", PROGRESS).frames
    assert b'"code":"OUT_OF_MEMORY"' in frames[-2]
    assert frames[-1] == b"data: [DONE]"
    join(server)
    assert (begun, server.server.exit_code) == ([1], OutOfMemory.exit_code)


def test_without_it_the_server_stays_after_a_failed_load(start, stand_in):
    server = start(failing_worker(stand_in), first_load=lambda: None)
    assert server.ask("GET", PROGRESS).frames[-1] == b"data: [DONE]"
    server.wait(lambda: not server.server._tasks)  # the one that would end the process
    assert server.ask("GET", "/livez").status == 200
    assert server.server.exit_code == 0


@pytest.mark.parametrize("error", [DeviceUnavailable("no such device"), RuntimeError("can't start new thread")])
def test_a_first_load_that_cannot_begin_ends_the_process(start, error, caplog):
    def refuse():
        raise error

    server = start(first_load=refuse, shutdown_grace_seconds=30)
    join(server)
    assert server.server.exit_code == getattr(error, "exit_code", 1)
    assert f"the first load cannot begin: {error}" in caplog.text
    assert server.worker.calls == {"start": 1, "drain": 1, "close": 1}


def test_a_signal_before_the_first_load_ends_the_process_as_any_signal(start, monkeypatch, caplog):
    def refuse():
        server.handle_exit(signal.SIGTERM, None)
        raise Unavailable("The worker is shutting down.")

    def first(self, *arguments, **options):
        nonlocal server
        server = self
        init(self, *arguments, **options)

    server, init = None, run.Server.__init__
    monkeypatch.setattr(run.Server, "__init__", first)
    running = start(first_load=refuse, shutdown_grace_seconds=30)
    join(running)
    assert running.server.exit_code == 0
    assert "cannot begin" not in caplog.text
    assert running.worker.calls == {"start": 1, "drain": 1, "close": 1}


def test_the_load_begins_only_when_requests_are_answered(start, stand_in):
    answers = []
    worker = stand_in.Worker(progress=[stand_in.HANG])
    server = start(worker, first_load=lambda: answers.append(worker.calls["start"]))
    server.wait(lambda: answers)
    assert answers == [1]
    assert server.ask("GET", "/livez").status == 200


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(start, sig):
    server = start(shutdown_grace_seconds=30)
    began = time.monotonic()
    server.server.handle_exit(sig, None)
    join(server)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tls_key": Path("/nowhere.pem")}, "--tls-key without --tls-cert"),
        ({"tls_cert": Path("/nowhere.pem")}, "--tls-cert /nowhere.pem: No such file"),
        ({"api_key_file": Path("/nowhere")}, "--api-key-file /nowhere: No such file"),
        ({"cors_origins": ("app.example.org/x",)}, "'app.example.org/x' is no origin"),
        ({"trusted_hosts": ("a:80",)}, "'a:80' is no host name"),
    ],
)
def test_what_is_wrong_is_said_before_anything_listens(option, message, monkeypatch):
    monkeypatch.setattr(run, "listen", lambda _: pytest.fail("listened"))
    with pytest.raises(InvalidRequest, match=message) as raised:
        run.serve(ServerConfig(**option), EngineConfig(device="cpu"), None, load=False)
    assert raised.value.exit_code == 2


def test_reading_again_goes_on_after_what_is_wrong(start, caplog):
    caplog.set_level("INFO")
    read = []

    def broken():
        raise InvalidRequest("the file holds no key.")

    server = start().server
    server._reloads = {"API keys": broken, "certificate": lambda: read.append(1)}
    server.reload()
    assert read == [1]
    assert "SIGHUP: certificate read again" in caplog.text
    assert "the file holds no key. What was there before stays." in caplog.text


def test_files_for_every_connection_are_asked_of_the_system(caplog):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = before[0], before[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        run.allow_open_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
        run.allow_open_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
        assert caplog.text == ""
        run.allow_open_files(2**40)
        assert "open files" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
