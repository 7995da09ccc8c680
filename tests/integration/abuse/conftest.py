"""The worker that is abused, and the client beside that must not notice."""

import sys
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.integration.conftest import Served, eventually, serving
from tests.tiny import CHAT_TEMPLATE, write_tiny_model

from .beside import Beside
from .wire import CONNECTIONS, describe

# Limits that are short enough to wait for.
IMPATIENT = """
import sys
from rbee_worker.config import EngineConfig, ServerConfig
from rbee_worker.log import configure
from rbee_worker.server import run
configure("info", "text")
limits = ServerConfig(
    port=0,
    max_connections=int(sys.argv[2]),
    header_seconds=1.0,
    body_seconds=1.0,
    idle_seconds=2.0,
    send_timeout_seconds=1.0,
)
sys.exit(run.serve(limits, EngineConfig(max_batch_size=4), sys.argv[1]))
"""


@pytest.fixture(scope="package")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = write_tiny_model(
        tmp_path_factory.mktemp("abused") / "tiny", chat_template=CHAT_TEMPLATE, max_position_embeddings=4096
    )
    command = [sys.executable, "-c", IMPATIENT, str(model), str(CONNECTIONS)]
    with serving(command=command) as served:
        # What is opened once and kept is open now: the process in which grammars are tried, threads.
        assert served.infer(prompt="x", max_tokens=2, regex="[ab]+")[-1]["event"] == "end"
        yield served
        # What uvicorn says of a stream that was cut because nobody read it.
        troubles = [line for line in served.log if " ERROR " in line and "without completing response" not in line]
        assert not troubles


def descriptors(worker: Served) -> int:
    return psutil.Process(worker.process.pid).num_fds()


@pytest.fixture(autouse=True)
def beside(worker: Served) -> Iterator[Beside]:
    """The other client; behind the test nothing is left of either."""
    before = descriptors(worker)
    client = Beside(worker)
    yield client
    client.goes_on()
    client.leave()
    eventually(lambda: describe(worker)["running"] + describe(worker)["queued"] == 0)
    eventually(lambda: descriptors(worker) <= before)
    assert httpx.get(f"{worker.url}/livez").status_code == 200
