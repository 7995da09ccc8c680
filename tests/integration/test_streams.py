"""Each SSE stream over a raw socket, byte for byte."""

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import RawConnection, RawResponse, Served, events_of, run, serving

INFER = "/v1/inference"
PROGRESS = "/v1/loading/progress"


def infer(worker: Served, **body: Any) -> RawConnection:
    payload = json.dumps({"prompt": "hello", "ignore_eos": True} | body).encode()
    return RawConnection(worker.address, "POST", INFER, payload, Content_Type="application/json")


def assert_stream_headers(response: RawResponse) -> None:
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"


def test_a_finished_job(served: Served) -> None:
    response = infer(served, max_tokens=5, seed=3, job_id="five").finish()
    assert response.status == 200
    assert_stream_headers(response)
    started, *tokens, end = events_of(response.body)
    assert started | {"started_at": ""} == {
        "event": "started",
        "job_id": "five",
        "model": "tiny",
        "started_at": "",
        "prompt_tokens": 5,
        "seed": 3,
    }
    assert [token["i"] for token in tokens] == list(range(len(tokens)))
    assert (end["tokens_out"], end["stop_reason"]) == (5, "max_tokens")
    frames = [
        b"data: " + json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()
        for event in (started, *tokens, end)
    ]
    assert response.body.removeprefix(b": keep-alive\n\n") == b"\n\n".join([*frames, b"data: [DONE]\n\n"])


def test_keep_alives_come_in_silence(served: Served) -> None:
    running = infer(served, max_tokens=3000, job_id="running")
    running.read_until(b'"token"')
    waiting = infer(served, max_tokens=2, job_id="waiting")
    waiting.read_until(b": keep-alive\n\n")
    httpx.delete(f"{served.url}{INFER}/running")
    assert [event["event"] for event in events_of(running.finish().body)][-1] == "end"
    quiet = waiting.finish()
    events_of(quiet.body)
    assert quiet.body.startswith(b": keep-alive\n\n")


def test_a_cancelled_job(served: Served) -> None:
    connection = infer(served, max_tokens=3000, job_id="to cancel")
    connection.read_until(b'"token"')
    for _ in range(2):
        answer = httpx.delete(f"{served.url}{INFER}/to%20cancel")
        assert (answer.status_code, answer.content) == (204, b"")
    events = events_of(connection.finish().body)
    assert events[-1]["stop_reason"] == "cancelled"


def test_a_client_that_leaves_gives_its_place_to_the_next(served: Served) -> None:
    leaver = infer(served, max_tokens=4000, job_id="leaver")
    leaver.read_until(b'"token"')
    leaver.close()
    assert events_of(infer(served, max_tokens=2).finish().body)[-1]["stop_reason"] == "max_tokens"
    assert httpx.get(f"{served.url}/v1/worker").json()["running"] == 0


def test_errors_before_the_first_byte_have_their_status_and_both_forms(served: Served) -> None:
    payload = b'{"prompt":""}'
    stream = RawConnection(served.address, "POST", INFER, payload, Accept="text/event-stream").finish()
    assert stream.status == 400
    assert_stream_headers(stream)
    events = events_of(stream.body)
    assert [(event["event"], event["code"]) for event in events] == [("error", "INVALID_REQUEST")]
    plain = RawConnection(served.address, "POST", INFER, payload).finish()
    assert (plain.status, plain.headers["content-type"]) == (400, "application/json")
    assert json.loads(plain.body)["error"]["code"] == "INVALID_REQUEST"


def test_a_full_queue_is_refused_with_retry_after(served: Served) -> None:
    held = [infer(served, max_tokens=3000, job_id=f"held-{i}") for i in range(3)]
    held[0].read_until(b'"token"')
    deadline = time.monotonic() + 20
    while httpx.get(f"{served.url}/v1/worker").json()["queued"] < 2:
        assert time.monotonic() < deadline
    refused = infer(served).finish()
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    for connection in held:
        connection.close()


def test_a_late_watcher_gets_the_end_of_the_story(served: Served) -> None:
    response = RawConnection(served.address, "GET", PROGRESS).finish()
    assert_stream_headers(response)
    events = events_of(response.body)
    assert [event["stage"] for event in events] == ["loading_to_vram", "ready"]
    assert events[0]["layers_loaded"] == events[0]["layers_total"] == 3


def test_a_load_is_watched_from_the_first_moment(gguf_path: Path) -> None:
    with serving("--model", str(gguf_path), wait=False) as worker:
        leaver = RawConnection(worker.address, "GET", PROGRESS)
        leaver.read_until(b"data: ")
        slow = RawConnection(worker.address, "GET", PROGRESS)
        ready = httpx.get(f"{worker.url}/v1/ready").json()
        assert ready == {"ready": False, "state": "loading", "progress_url": PROGRESS}
        health = httpx.get(f"{worker.url}/health")
        assert (health.status_code, health.json()["state"]) == (200, "loading")
        early = httpx.post(f"{worker.url}{INFER}", json={"prompt": "x"})
        assert (early.status_code, early.json()["error"]["code"]) == (503, "UNAVAILABLE")
        assert 1 <= int(early.headers["retry-after"]) <= 60
        unready = httpx.get(f"{worker.url}/readyz")
        assert unready.status_code == 503
        assert "retry-after" in unready.headers
        leaver.close()
        events = worker.events()
        layers = [event["layers_loaded"] for event in events if event["stage"] == "loading_to_vram"]
        assert layers[-1] == 30
        assert len(set(layers)) > 5
        assert [event["stage"] for event in events][-2:] == ["warming_up", "ready"]
        # It has read nothing all the while, and yet misses neither the end nor [DONE].
        assert events_of(slow.finish().body)[-1] == events[-1]
        assert httpx.get(f"{worker.url}/readyz").status_code == 200
        assert httpx.get(f"{worker.url}/v1/ready").json() == {"ready": True, "state": "idle", "model_loaded": True}


def test_a_cancelled_load(gguf_path: Path) -> None:
    with serving("--model", str(gguf_path), wait=False) as worker:
        watcher = RawConnection(worker.address, "GET", PROGRESS)
        watcher.read_until(b'"loading_to_vram"')
        assert httpx.delete(f"{worker.url}/v1/loading").status_code == 202
        events = events_of(watcher.finish().body)
        assert events[-1]["stage"] == "cancelled"
        assert httpx.delete(f"{worker.url}/v1/loading").status_code == 404
        assert httpx.get(f"{worker.url}/health").json() == {"status": "healthy", "state": "no_model", "vram_bytes": 0}
        answer = httpx.post(f"{worker.url}/v1/loading", json={})
        assert (answer.status_code, answer.json()["progress_url"]) == (202, PROGRESS)
        assert httpx.post(f"{worker.url}/v1/loading", json={}).status_code == 409
        ready = worker.events()[-1]
        assert ready["stage"] == "ready"
        newest, oldest = httpx.get(f"{worker.url}/v1/loading/history").json()["loads"]
        assert newest["report"] == ready["report"]
        assert (newest["outcome"], newest["elapsed_seconds"]) == ("ready", ready["elapsed_seconds"])
        assert (oldest["outcome"], oldest["code"]) == ("cancelled", "CANCELLED")
        assert oldest["vram_mb_freed"] == events[-1]["vram_mb_freed"]


def test_a_bad_model(tmp_path: Path) -> None:
    with serving("--model", str(tmp_path / "gone.safetensors"), wait=False) as worker:
        response = RawConnection(worker.address, "GET", PROGRESS).finish()
        *_, error = events_of(response.body)
        assert (error["stage"], error["code"]) == ("error", "MODEL_NOT_FOUND")
        assert "gone.safetensors" in error["message"]
        health = httpx.get(f"{worker.url}/health")
        assert (health.status_code, health.json()["state"]) == (503, "failed")
        assert httpx.get(f"{worker.url}/livez").status_code == 200
        assert httpx.post(f"{worker.url}{INFER}", json={"prompt": "x"}).status_code == 503
        assert worker.stop() == 0


def test_exit_on_load_error_tells_watchers_first(tmp_path: Path) -> None:
    with serving("--model", str(tmp_path / "gone.gguf"), "--exit-on-load-error", wait=False) as worker:
        assert worker.process.wait(30) == 3


def test_no_load_to_speak_of(tiny: Path) -> None:
    with serving("--model", str(tiny), "--no-load", wait=False) as worker:
        response = RawConnection(worker.address, "GET", PROGRESS).finish()
        assert response.status == 503
        assert "retry-after" in response.headers
        assert httpx.get(f"{worker.url}/health").json()["state"] == "no_model"
        assert httpx.post(f"{worker.url}/v1/loading", json={"model": "/etc/passwd"}).status_code == 403
        assert httpx.post(f"{worker.url}/v1/loading", json={"model": str(tiny)}).status_code == 202
        assert worker.events()[-1]["stage"] == "ready"
        assert httpx.post(f"{worker.url}/v1/unload").json()["vram_bytes_freed"] > 0
        assert httpx.get(f"{worker.url}/health").json() == {"status": "healthy", "state": "no_model", "vram_bytes": 0}


@pytest.mark.parametrize(("grace", "reason"), [("30", "max_tokens"), ("0.2", "cancelled")])
def test_shutdown_in_mid_stream(tiny: Path, grace: str, reason: str) -> None:
    tokens = 400 if reason == "max_tokens" else 4000
    with serving("--model", str(tiny), "--shutdown-grace", grace) as worker:
        connection = infer(worker, max_tokens=tokens)
        connection.read_until(b'"token"')
        worker.process.send_signal(signal.SIGTERM)
        events = events_of(connection.finish().body)
        assert events[-1]["stop_reason"] == reason
        assert worker.process.wait(30) == 0


def test_work_is_refused_while_draining(tiny: Path) -> None:
    with serving("--model", str(tiny), "--shutdown-grace", "30") as worker:
        connection = infer(worker, max_tokens=4000)
        connection.read_until(b'"token"')
        worker.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while httpx.get(f"{worker.url}/health").json()["state"] != "draining":
            assert time.monotonic() < deadline
        refused = httpx.post(f"{worker.url}{INFER}", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable_error")
        assert worker.stop() == 128 + signal.SIGTERM
        connection.close()


def test_shutdown_while_loading_ends_the_watchers(gguf_path: Path) -> None:
    with serving("--model", str(gguf_path), wait=False) as worker:
        watcher = RawConnection(worker.address, "GET", PROGRESS)
        watcher.read_until(b'"loading_to_vram"')
        worker.process.send_signal(signal.SIGTERM)
        assert events_of(watcher.finish().body)[-1]["stage"] == "cancelled"
        assert worker.process.wait(30) == 0


def test_a_taken_port_is_said(served: Served) -> None:
    host, port = served.address
    done = run("serve", "--addr", f"{host}:{port}")
    assert done.returncode == 1
    assert f"{host}:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_loopback_without_a_key(tiny: Path) -> None:
    done = run("serve", "--addr", "0.0.0.0:0", "--model", str(tiny))
    assert done.returncode == 2
    assert "--allow-unauthenticated" in done.stderr


def test_a_key_is_asked_for_on_all_but_health(tiny: Path) -> None:
    with serving("--model", str(tiny), "--api-key", "sesame", wait=False) as worker:
        assert httpx.get(f"{worker.url}/health").status_code == 200
        refused = httpx.get(f"{worker.url}/v1/worker")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        good = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{worker.url}/v1/worker", headers=good).status_code == 200


def test_a_socket_that_never_sends_its_request_costs_nobody(served: Served) -> None:
    with socket.create_connection(served.address):
        assert httpx.get(f"{served.url}/health").status_code == 200
