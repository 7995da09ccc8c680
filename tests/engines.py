"""An engine with a model in it, run to its end, and what it says."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rbee_worker.config import EngineConfig
from rbee_worker.events import InferenceEvent, Token
from rbee_worker.runtime.engine.engine import Engine


def loaded(path: Path | str, dtype: str = "float32", **config: Any) -> Engine:
    """An engine on the CPU with the model in it."""
    engine = Engine(EngineConfig(device="cpu", dtype=dtype, **config))
    for _ in engine.load(str(path)):
        pass
    return engine


def run(engine: Engine, meanwhile: Callable[[int], None] = lambda _: None) -> dict[str, list[InferenceEvent]]:
    """Step until nothing is left; events by job. ``meanwhile`` is called behind each step with its number."""
    streams: dict[str, list[InferenceEvent]] = {}
    for step in range(10_000):
        if not engine.has_work:
            return streams
        for job_id, event in engine.step():
            streams.setdefault(job_id, []).append(event)
        meanwhile(step)
    raise AssertionError("the engine does not come to an end")


def text(events: Iterable[InferenceEvent]) -> str:
    """What a job said."""
    return "".join(event.t for event in events if isinstance(event, Token))
