"""Running the commands, and what a stand-in engine does for them."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from rbee_worker.cancellation import Cancellation
from rbee_worker.cli.app import app
from rbee_worker.config import EngineConfig, GenerationRequest
from rbee_worker.events import Event, LoadingEvent
from tests.unit.samples import JOB, LOAD

ROOT = Path(__file__).parents[3]


def run(*args: str, stdin: str | bytes | None = None, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, list(args), input=stdin, env=env, prog_name="rbee-worker")


@dataclass
class Script:
    """What the stand-in engine does, and what it was asked."""

    loading: Callable[[Cancellation], Iterator[LoadingEvent]] = lambda _: iter(LOAD)  # type: ignore[assignment]
    generating: Callable[[], Iterator[Event]] = lambda: iter(JOB)
    configs: list[EngineConfig] = field(default_factory=list)
    models: list[str | None] = field(default_factory=list)
    requests: list[GenerationRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def noted(self, what: str, events: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from events
        finally:
            self.closed.append(what)
