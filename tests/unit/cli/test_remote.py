"""``load`` and ``generate`` with ``--addr``."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from rbee_worker.events import InferenceFailed, LoadCancelled, to_json
from tests.unit.cli.harness import Script, run
from tests.unit.fake_worker import DONE, FakeWorker, answer, frames, refused, stream
from tests.unit.samples import JOB, LOAD, STARTED, TEXT, layers


def test_generate_from_a_worker(engine: Script, worker: FakeWorker):
    worker.answers["POST /v1/inference"] = stream(frames(*JOB))
    result = run("generate", "-p", "hi", "--addr", worker.addr, env={"RBEE_API_KEY": "k", "RBEE_MODEL": "ignored"})
    assert (result.exit_code, result.stdout) == (0, TEXT)
    assert worker.calls[0].headers["Authorization"] == "Bearer k"
    assert worker.calls[0].body["messages"] == [{"role": "user", "content": "hi"}]
    assert engine.models == []
    result = run("generate", "-p", "hi", "--raw", "--addr", worker.addr, "--json")
    assert result.stdout == "".join(to_json(event) + "\n" for event in JOB)
    assert worker.calls[1].body["prompt"] == "hi"


def test_load_at_a_worker(worker: FakeWorker):
    worker.answers["POST /v1/loading"] = answer(202, {})
    worker.answers["GET /v1/loading/progress"] = stream(frames(*LOAD))
    result = run("load", "m", "--addr", worker.addr, "--dtype", "float16", "--quantize", "int8", "--mmap", "--json")
    assert result.exit_code == 0
    assert result.stdout == "".join(to_json(event) + "\n" for event in LOAD)
    assert worker.calls[0].body == {"model": "m", "dtype": "float16", "quantize": "int8", "mmap": True}
    assert "peak host memory" in run("load", "--addr", worker.addr).stderr


def test_interrupting_a_load_at_a_worker_cancels_it_there(worker: FakeWorker):
    cancelled = LoadCancelled(vram_mb_freed=20, seq=9, elapsed_seconds=0.2)

    # The stream stays open until the interrupt has come.
    waiting = threading.Event()

    def first(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        handler.wfile.write(frames(layers(0, 0), layers(1, 1), done=False).encode())
        worker.answers["GET /v1/loading/progress"] = stream(frames(layers(1, 1), cancelled))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        waiting.wait(5)
        handler.close_connection = True

    worker.answers["POST /v1/loading"] = answer(202, {})
    worker.answers["GET /v1/loading/progress"] = first
    worker.answers["DELETE /v1/loading"] = answer(202, {})
    result = run("load", "m", "--addr", worker.addr, "--json")
    waiting.set()
    assert result.exit_code == 130
    # The second subscription's snapshot is not shown again.
    assert result.stdout == "".join(to_json(event) + "\n" for event in (layers(0, 0), layers(1, 1), cancelled))
    assert "DELETE /v1/loading" in worker.asked()


def test_a_load_cancelled_by_someone_else(worker: FakeWorker):
    worker.answers["POST /v1/loading"] = answer(202, {})
    worker.answers["GET /v1/loading/progress"] = stream(
        frames(LOAD[0], LoadCancelled(vram_mb_freed=0, seq=1, elapsed_seconds=0.1))
    )
    result = run("load", "m", "--addr", worker.addr, "--quiet")
    assert (result.exit_code, result.stderr) == (130, "error: The load was cancelled at the worker.\n")


@pytest.mark.parametrize(
    ("reply", "code", "words"),
    [
        (refused(409, "CONFLICT", "Another load runs."), 1, "Another load runs."),
        (refused(403, "FORBIDDEN", "Not that model."), 1, "Not that model."),
        (refused(404, "MODEL_NOT_FOUND", "m: no such file."), 3, "m: no such file."),
        (refused(401, "UNAUTHORIZED", "No key."), 1, "--api-key"),
        (answer(502, "<html>"), 6, "not a worker's error"),
    ],
)
def test_what_a_worker_refuses(worker: FakeWorker, reply: Callable[..., None], code: int, words: str):
    worker.answers["POST /v1/loading"] = reply
    result = run("load", "m", "--addr", worker.addr)
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stdout == ""


def test_a_stream_that_is_cut_exits_6_and_keeps_its_text(worker: FakeWorker):
    worker.answers["POST /v1/inference"] = stream(frames(*JOB[:2], done=False), cut=True)
    result = run("generate", "-p", "hi", "--addr", worker.addr)
    assert (result.exit_code, result.stdout) == (6, "Hé\u2028llo\x85\n")
    assert result.stderr.startswith("error: ")


def test_an_error_event_of_a_worker_is_in_the_json_and_on_stderr(worker: FakeWorker):
    failed = InferenceFailed(code="INFERENCE_FAILED", message="A step failed.")
    worker.answers["POST /v1/inference"] = stream(frames(STARTED, failed, done=False), DONE)
    result = run("generate", "-p", "hi", "--addr", worker.addr, "--json")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == to_json(failed)
    assert result.stderr == "error: A step failed.\n"
