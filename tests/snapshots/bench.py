"""The keys of what ``bench decode`` and ``bench serve`` write with ``--json``, and the units of their figures."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from rbee_worker.cli.bench import decode, machine, serve
from rbee_worker.cli.bench.result import Result
from rbee_worker.client import WorkerClient
from rbee_worker.config import ServerConfig
from rbee_worker.events import Ready
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.worker.worker import Worker
from tests.snapshots.loading import ENGINE
from tests.snapshots.plain import plain, pretty
from tests.tiny import write_tiny_model
from tests.unit.server.conftest import Running


def take(folder: Path) -> dict[str, str]:
    """A file for each of the two."""
    model = str(write_tiny_model(folder / "tiny"))
    found = {"decode": _decode(model), "serve": _serve(model)}
    return {f"{name}.json": pretty(plain(_masked(result.to_dict()), folder)) for name, result in found.items()}


def _decode(model: str) -> Result:
    engine = Engine(replace(ENGINE, max_batch_size=max(decode.BATCHES), prefix_cache=False))
    ready = list(engine.load(model))[-1]
    assert isinstance(ready, Ready)
    with mock.patch.object(machine, "READ_BYTES", 2**20):
        return decode.measure(engine, ready.report, runs=1, tokens=2, say=lambda _: None)


def _serve(model: str) -> Result:
    server = Running(Worker(ENGINE), ServerConfig(port=0), model=model, has_start_model=True)
    addr = f"127.0.0.1:{server.port}"
    try:
        with WorkerClient(addr) as client:
            for _ in client.load(None):
                pass
        return serve.measure(addr, None, serve.Load(1000, requests=4, prompt_words=8, max_tokens=48, seed=0), runs=1)
    finally:
        server.stop()


def _masked(told: dict[str, Any]) -> dict[str, Any]:
    told["machine"] = {key: f"<{type(value).__name__}>" for key, value in told["machine"].items()}
    told["figures"] = {
        key: f"{figure['unit']}: {', '.join(name for name in figure if name != 'unit')}"
        for key, figure in told["figures"].items()
    }
    return told
