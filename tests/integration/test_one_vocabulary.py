"""The same load and the same generation through the library, ``--json`` and SSE: the same events."""

import json
from pathlib import Path
from typing import Any

import httpx

from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.conformance.order import faults_in
from rbee_worker.events import to_dict
from rbee_worker.runtime.engine.engine import Engine

from .conftest import Served, events_of, run, serving

VARIABLE = {
    "elapsed_seconds",
    "bytes_per_second",
    "eta_seconds",
    "job_id",
    "started_at",
    "decode_time_ms",
    "prefill_time_ms",
    "tokens_per_second",
    "phases",
    "peak_host_mb",
}
"""What depends on the clock, the machine's load, or chance. ``bytes_loaded`` runs ahead of the layers by what is being
read at the moment, and so is compared at the end only."""

PROMPT = "Tell me a joke about 😀 and 猫."
SAMPLING = {"max_tokens": 24, "seed": 5, "temperature": 0.8, "stop": ["\n\n"]}


def steady(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without what varies from run to run, and without the ticks inside a long layer."""
    kept = []
    layers = -1
    for event in events:
        left = {key: value for key, value in event.items() if key not in VARIABLE | {"seq", "bytes_loaded"}}
        if "report" in left:
            left["report"] = {key: value for key, value in left["report"].items() if key not in VARIABLE}
        if event.get("stage") == "loading_to_vram":
            if event["layers_loaded"] == layers:
                continue
            layers = event["layers_loaded"]
        # A layer's event carries the memory at that moment; the embedding may have come a tick before or after.
        kept.append(left | ({"vram_mb": None} if layers <= 0 else {}))
    return kept


def keys(events: list[dict[str, Any]]) -> list[list[str]]:
    """Names and order of the keys of each kind of event, the estimate left out until there is one."""
    kinds = {event.get("stage") or event["event"]: [key for key in event if key != "eta_seconds"] for event in events}
    return [[kind, *names] for kind, names in kinds.items()]


def test_library_json_and_sse_agree(model_dir: Path) -> None:
    model = str(model_dir)
    engine = Engine(EngineConfig(max_batch_size=1))
    library_load = [to_dict(event) for event in engine.load(model)]
    sampling = SamplingParams(**SAMPLING | {"stop": tuple(SAMPLING["stop"])})
    library_job = [to_dict(event) for event in engine.generate(GenerationRequest(prompt=PROMPT, sampling=sampling))]

    options = ["--max-tokens", "24", "--seed", "5", "--temperature", "0.8", "--stop", "\n\n"]
    done = run("generate", "--model", model, "--prompt", PROMPT, "--raw", "--json", *options)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    json_load = [line for line in lines if "stage" in line]
    json_job = [line for line in lines if "event" in line]

    with serving("--model", model, "--no-load", "--max-batch-size", "1", wait=False) as worker:
        httpx.post(f"{worker.url}/v1/loading", json={})
        sse_load = worker.events()
        sse_job = worker.infer(prompt=PROMPT, **SAMPLING)

    assert steady(json_job) == steady(library_job) == steady(sse_job)
    assert keys(json_job) == keys(library_job) == keys(sse_job)
    assert steady(json_load) == steady(library_load)
    assert keys(json_load) == keys(library_load)
    # A watcher who comes a moment later begins with the state of that moment, and then misses nothing.
    assert faults_in(sse_load) == faults_in(library_load) == []
    expected = steady(library_load)
    assert steady(sse_load)[1:] == expected[len(expected) - len(steady(sse_load)) + 1 :]


def test_the_bytes_are_the_same_too(served: Served) -> None:
    body = httpx.post(f"{served.url}/v1/inference", json={"prompt": "hello", "max_tokens": 4, "seed": 1}).text
    done = run(
        "generate", "--addr", served.url, "--prompt", "hello", "--raw", "--json", "--max-tokens", "4", "--seed", "1"
    )
    frames = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: {")]
    tokens = [frame for frame in frames if '"event":"token"' in frame]
    assert tokens
    assert tokens == [line for line in done.stdout.splitlines() if '"event":"token"' in line]
    assert len(events_of(body)) == len(done.stdout.splitlines())
