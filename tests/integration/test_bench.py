"""``bench`` as users run it: a model of their own, and a worker that serves."""

import json
import signal
from pathlib import Path

import httpx
import pytest

from .conftest import Served, eventually, run, start, wait_until_idle

LOAD = ("--rate", "40", "--max-tokens", "6", "--prompt-words", "32")


def test_a_running_worker_is_measured_and_compared(worker: Served, tmp_path: Path) -> None:
    # It takes eight jobs, four of them waiting: none of these is refused.
    before = httpx.get(f"{worker.url}/metrics").text
    done = run("bench", "serve", "--addr", worker.url, *LOAD, "--requests", "7", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["failures"] == {}
    assert told["model"] == {"name": "tiny-chat"}
    figures = {key: figure["median"] for key, figure in told["figures"].items()}
    for name in ("first_token", "between_tokens", "end_to_end"):
        assert 0 < figures[f"{name}_p50_ms"] <= figures[f"{name}_p90_ms"] <= figures[f"{name}_p99_ms"]
    assert figures["first_token_p50_ms"] < figures["end_to_end_p50_ms"]
    # The worker counts the same: seven answers of six tokens, and one of one token before them.
    after = httpx.get(f"{worker.url}/metrics").text
    assert made(after) - made(before) == 7 * 6 + 1
    assert figures["output_tok_s"] / figures["requests_per_s"] == pytest.approx(6, rel=1e-3)
    file = tmp_path / "before.json"
    file.write_text(done.stdout)
    again = run("bench", "serve", "--addr", worker.url, *LOAD, "--requests", "4", "--compare", str(file))
    assert again.returncode == 0, again.stderr
    assert "now / before" in again.stdout
    assert "before, the settings were others: requests 7" in again.stdout


def test_what_a_full_worker_refuses_is_counted(served: Served) -> None:
    done = run("bench", "serve", "--addr", served.url, "--rate", "1000", "--requests", "6", "--max-tokens", "600")
    assert done.returncode == 0, done.stderr
    assert "failed with QUEUE_FULL: " in done.stdout


def test_an_interrupt_ends_the_requests_too(served: Served) -> None:
    process = start("bench", "serve", "--addr", served.url, "--rate", "20", "--max-tokens", "3000")
    eventually(lambda: httpx.get(f"{served.url}/v1/worker").json()["running"])
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
    wait_until_idle(served)


def test_decoding_is_measured_with_memory_beside_it(tiny: Path) -> None:
    options = ("--max-context", "200", "--tokens", "1", "--runs", "1", "--json")
    done = run("bench", "decode", "-m", str(tiny), *options)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert done.stderr == ""
    assert told["model"]["weights_bytes"] > told["model"]["weights_bytes_per_token"] > 0
    assert told["figures"]["weights_over_read"]["median"] > 0
    assert "prefill_512_tok_s" in told["left_out"]


def made(metrics: str) -> int:
    """Tokens that a worker has made so far."""
    line = next(line for line in metrics.splitlines() if line.startswith("rbee_generation_tokens_total "))
    return int(float(line.split()[1]))
