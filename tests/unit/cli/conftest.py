"""An environment of its own for each command; a stand-in for the engine, and one for a worker."""

import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from rbee_worker import log
from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig, GenerationRequest
from rbee_worker.events import Event, LoadingEvent
from tests.unit.cli.harness import Script
from tests.unit.fake_worker import FakeWorker, running


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RBEE_MODEL", "RBEE_API_KEY", "FORCE_COLOR", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in (*log._UVICORN, *log._CHATTY):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()

    class Engine:
        def __init__(self, config: EngineConfig) -> None:
            script.configs.append(config)

        def load(self, model: str | None, cancel: Cancellation) -> Iterator[LoadingEvent]:
            script.models.append(model)
            return script.noted("load", script.loading(cancel))

        def generate(self, request: GenerationRequest) -> Iterator[Event]:
            script.requests.append(request)
            return script.noted("generate", script.generating())

        def cancel(self, job_id: str) -> None:
            assert job_id == script.requests[-1].job_id
            script.cancelled.set()

    # What is imported for the first time while the stand-in is there would be without the rest of the real module.
    importlib.import_module("rbee_worker.server.run")
    module = ModuleType("rbee_worker.runtime.engine.engine")
    module.Engine = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rbee_worker.runtime.engine.engine", module)
    return script


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    with running() as fake:
        yield fake
