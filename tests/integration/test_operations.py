"""What operators see and do at run time: metrics during a load, held requests, swapping models."""

import json
import re
import threading
import time
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.tiny import write_tiny_model
from tests.unit.kernels.matrices import HERE, MISSING

from .conftest import RawConnection, Served, events_of, run, serving

INFER = "/v1/inference"


def metrics(worker: Served) -> dict[str, float]:
    """The samples of /metrics by name and labels."""
    page = httpx.get(f"{worker.url}/metrics")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", page.text, re.MULTILINE)}


def test_metrics_are_there_from_the_first_moment(gguf_path: Path) -> None:
    with serving("--model", str(gguf_path), wait=False) as worker:
        assert metrics(worker)['rbee_state{state="loading"}'] == 1
        watcher = RawConnection(worker.address, "GET", "/v1/loading/progress")
        watcher.read_until(b'"layers_loaded":2')
        during = metrics(worker)
        assert 0 < during["rbee_load_read_bytes"] <= during["rbee_load_total_bytes"]
        assert 0 < during['rbee_load_layers_loaded{device="cpu"}'] <= 30
        assert during["rbee_load_bytes_per_second"] > 0
        assert during["rbee_host_peak_memory_bytes"] > during['rbee_load_device_memory_bytes{device="cpu"}']
        watcher.finish()
        after = metrics(worker)
        assert after['rbee_state{state="ready"}'] == 1
        assert after['rbee_loads_total{outcome="ready"}'] == 1
        assert after['rbee_load_stage{stage="ready"}'] == 1
        assert after['rbee_load_layers_loaded{device="cpu"}'] == 30
        report = worker.events()[-1]["report"]
        for phase, seconds in report["phases"].items():
            assert abs(after[f'rbee_load_phase_seconds{{phase="{phase}"}}'] - seconds) < 0.3


def test_held_requests_are_kept_alive_and_served_when_ready(gguf_path: Path) -> None:
    options = ("--hold-requests", "--keep-alive", "0.1")
    with serving("--model", str(gguf_path), *options, wait=False) as worker:
        held = RawConnection(worker.address, "POST", INFER, b'{"prompt":"Hi","max_tokens":3}')
        received = held.read_until(b": keep-alive\n\n")
        assert received.startswith(b"HTTP/1.1 200")
        assert b'"event"' not in received
        refused = httpx.post(f"{worker.url}{INFER}", json={"prompt": "Hi", "max_tokens": 0})
        assert refused.status_code == 400
        events = events_of(held.finish().body)
        assert (events[0]["event"], events[-1]["tokens_out"]) == ("started", 3)


def test_held_requests_of_a_load_that_fails_are_told(gguf_path: Path) -> None:
    with serving("--model", str(gguf_path), "--hold-requests", "--keep-alive", "0.1", wait=False) as worker:
        held = RawConnection(worker.address, "POST", INFER, b'{"prompt":"Hi"}')
        held.read_until(b": keep-alive\n\n")
        assert httpx.delete(f"{worker.url}/v1/loading").status_code == 202
        (event,) = events_of(held.finish().body)
        assert (event["event"], event["code"]) == ("error", "INFERENCE_FAILED")


def test_held_requests_whose_clients_leave_cost_nothing(gguf_path: Path) -> None:
    options = ("--hold-requests", "--keep-alive", "0.1", "--max-queue", "1")
    with serving("--model", str(gguf_path), *options, wait=False) as worker:
        leaver = RawConnection(worker.address, "POST", INFER, b'{"prompt":"Hi","job_id":"gone"}')
        leaver.read_until(b": keep-alive\n\n")
        over = RawConnection(worker.address, "POST", INFER, b'{"prompt":"Hi"}').finish()
        assert (over.status, over.headers["retry-after"]) == (429, "1")
        leaver.close()
        worker.events()
        assert httpx.get(f"{worker.url}/v1/worker").json()["running"] == 0


def test_a_second_model_takes_over_while_the_first_serves(tiny: Path, gguf_path: Path) -> None:
    with serving("--model", str(tiny), "--allow-model", str(gguf_path)) as worker:
        long = RawConnection(worker.address, "POST", INFER, b'{"prompt":"x","max_tokens":300,"ignore_eos":true}')
        long.read_until(b'"token"')
        answer = httpx.post(f"{worker.url}/v1/loading", json={"model": str(gguf_path)})
        assert (answer.status_code, answer.json()["resident_keeps_serving"]) == (202, True)
        busy = httpx.get(f"{worker.url}/v1/ready").json()
        assert busy["ready"]
        assert events_of(long.finish().body)[-1]["stop_reason"] == "max_tokens"
        assert worker.events()[-1]["report"]["parameters"] == 134515008
        assert worker.infer(prompt="The capital of France is", temperature=0, max_tokens=1)[1]["t"] == " Paris"


def test_a_failed_or_cancelled_load_leaves_the_resident_model_serving(
    tiny: Path, gguf_path: Path, tmp_path: Path
) -> None:
    broken = write_tiny_model(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    options = ("--allow-model", str(broken), "--allow-model", str(gguf_path))
    with serving("--model", str(tiny), *options) as worker:
        answers: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answers.append(httpx.post(f"{worker.url}{INFER}", json={"prompt": "x", "max_tokens": 2}).status_code)

        client = threading.Thread(target=ask)
        client.start()
        httpx.post(f"{worker.url}/v1/loading", json={"model": str(broken)})
        assert worker.events()[-1]["code"] == "MODEL_MALFORMED"
        httpx.post(f"{worker.url}/v1/loading", json={"model": str(gguf_path)})
        watcher = RawConnection(worker.address, "GET", "/v1/loading/progress")
        watcher.read_until(b'"loading_to_vram"')
        both = httpx.get(f"{worker.url}/v1/worker").json()["vram_bytes"]
        assert httpx.delete(f"{worker.url}/v1/loading").status_code == 202
        assert events_of(watcher.finish().body)[-1]["stage"] == "cancelled"
        stop.set()
        client.join()
        assert set(answers) == {200}
        assert len(answers) > 2
        after = httpx.get(f"{worker.url}/v1/worker").json()
        assert (after["model"], after["state"]) == ("tiny", "ready")
        assert after["vram_bytes"] <= both


def test_unloading_during_a_load_is_refused(gguf_path: Path) -> None:
    with serving("--model", str(gguf_path), wait=False) as worker:
        assert httpx.post(f"{worker.url}/v1/unload").status_code == 409
        assert worker.events()[-1]["stage"] == "ready"


def test_load_of_a_running_worker_draws_its_events(tiny: Path) -> None:
    with serving("--model", str(tiny), "--no-load", wait=False) as worker:
        done = run("load", "--addr", worker.url)
        assert done.returncode == 0
        assert "3/3 layers" in done.stderr
        assert httpx.get(f"{worker.url}/readyz").status_code == 200
        deadline = time.monotonic() + 10
        while metrics(worker)["rbee_load_watchers"]:
            assert time.monotonic() < deadline


def test_what_cannot_fit_is_refused_before_any_memory_is_taken(tmp_path: Path) -> None:
    giant = write_tiny_model(
        tmp_path / "giant", max_position_embeddings=2**24, num_hidden_layers=24, num_key_value_heads=4
    )
    done = run("load", str(giant), "--json", "--dtype", "float32")
    assert done.returncode == 5
    stages = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["stage"] for event in stages] == ["resolving", "error"]
    assert stages[1]["code"] == "OUT_OF_MEMORY"
    assert re.search(r"giant needs [\d,]+ MiB on \w+.* \(weights [\d,]+ MiB, cache [\d,]+ MiB", done.stderr)
    remedy = re.search(r"--max-context (\d+)", done.stderr)
    assert remedy is not None
    assert run("load", str(giant), "--max-context", "4096", "--quiet").returncode == 0
    with serving("--model", str(giant), "--dtype", "float32") as worker:
        assert worker.events()[-1]["code"] == "OUT_OF_MEMORY"
        assert httpx.get(f"{worker.url}/health").status_code == 503


@pytest.mark.skipif(not HERE, reason="; ".join(MISSING.values()))
def test_mapping_is_asked_for_on_the_command_line_and_over_http(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    model = write_tiny_model(tmp_path / "model", **sizes)
    weights = model / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    asking = ("generate", "-m", str(model), "--prompt", "x", "--temperature", "0", "--max-tokens", "8")
    read, mapped = run(*asking, RBEE_KERNELS="auto"), run(*asking, "--mmap", RBEE_KERNELS="auto")
    assert (read.returncode, mapped.returncode, mapped.stdout) == (0, 0, read.stdout)
    refused = run(*asking, "--mmap", RBEE_KERNELS="torch")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "there are no CPU kernels (RBEE_KERNELS is torch)" in refused.stderr
    inspected = json.loads(run("inspect", str(model), "--mmap", "--json", RBEE_KERNELS="auto").stdout)
    with serving("--model", str(model), "--mmap", RBEE_KERNELS="auto") as worker:
        first = worker.events()[-1]["report"]
        assert httpx.post(f"{worker.url}/v1/loading", json={"mmap": False}).status_code == 202
        second = worker.events()[-1]["report"]
        assert run("load", "--addr", worker.url, "--mmap", "--quiet").returncode == 0
        third = worker.events()[-1]["report"]
    mapped_mb = inspected["mapped_bytes"] // 2**20
    assert [report["mapped_mb"] for report in (first, second, third)] == [mapped_mb, 0, mapped_mb]
    assert mapped_mb > 0
    assert [report["storage"].endswith(", mapped") for report in (first, second, third)] == [True, False, True]


def test_int4_is_refused_without_kernels_before_anything_is_looked_for(tmp_path: Path) -> None:
    done = run("load", str(tmp_path / "nowhere"), "--quantize", "int4", "--quiet", RBEE_KERNELS="torch")
    assert done.returncode == 4
    assert "int4 needs the worker's own CPU kernels. RBEE_KERNELS is torch." in done.stderr
    assert "Use --quantize int8 or --quantize none." in " ".join(done.stderr.split())


def test_int8_is_asked_for_on_the_command_line_and_over_http(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    model = write_tiny_model(tmp_path / "model", **sizes)
    done = run("generate", "-m", str(model), "--quantize", "int8", "--prompt", "x", "--max-tokens", "2", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["report"]["quantize"] for event in events if "report" in event] == ["int8"]
    assert events[-1]["event"] == "end"
    with serving("--model", str(model)) as worker:
        whole = worker.events()[-1]["report"]
        assert httpx.post(f"{worker.url}/v1/loading", json={"quantize": "int8"}).status_code == 202
        report = worker.events()[-1]["report"]
    assert (whole["quantize"], report["quantize"]) == ("none", "int8")
    assert report["device_mb"]["cpu"] < 0.7 * whole["device_mb"]["cpu"]
    assert report["saved_mb"] > 0
