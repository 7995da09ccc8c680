"""The one line of a request: what became of it, and whose it was; never what was asked."""

import logging

import pytest

from rbee_worker.config import EngineConfig
from rbee_worker.worker.worker import Worker
from tests.tiny import write_tiny_model

INFERENCE = "/v1/inference"
SECRET = "SECRETTEXT"  # noqa: S105 - a prompt that no line may hold


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny", max_position_embeddings=4096))


@pytest.fixture
def lines(caplog):
    """The records of the access log."""
    caplog.set_level(logging.DEBUG)
    return lambda: [record for record in caplog.records if record.name == "rbee_worker.access"]


@pytest.fixture
def real(start, model):
    """Starts a server around a real worker with a tiny model, ready to serve."""

    def begin(**config):
        worker = Worker(EngineConfig(device="cpu"))
        server = start(worker, first_load=lambda: worker.loads.begin(model), **config)
        server.wait(lambda: worker.serves)
        return server

    return begin


def test_the_line_of_a_job(real, lines, caplog):
    server = real(api_keys=("k",))
    body = {"prompt": SECRET, "max_tokens": 3, "ignore_eos": True, "job_id": "job 1"}
    assert server.ask("POST", INFERENCE, body, {"Authorization": "Bearer k"}).status == 200
    server.wait(lines)
    (line,) = lines()
    assert line.getMessage() == f"POST {INFERENCE}"
    assert (line.status, line.client, line.job_id) == (200, "key-8254c329", "job 1")
    assert (line.tokens_out, line.stop_reason) == (3, "max_tokens")
    assert line.tokens_in >= 1
    assert line.ms > 0
    assert SECRET not in caplog.text
    assert "Bearer" not in caplog.text


def test_the_line_of_a_client_that_leaves(real, lines):
    server = real()
    stream = server.open("POST", INFERENCE, {"prompt": "p", "max_tokens": 3000, "ignore_eos": True})
    stream.read_until(b'"token"')
    stream.leave()
    server.wait(lines)
    (line,) = lines()
    assert (line.client, line.stop_reason) == ("127.0.0.1", "cancelled")
    assert 0 < line.tokens_out < 3000
    server.wait(lambda: server.worker.jobs.running == 0)


def test_refused_requests_name_no_client(start, lines):
    server = start(api_keys=("k",))
    assert server.ask("POST", INFERENCE, {"prompt": "p"}).status == 401
    server.wait(lines)
    (line,) = lines()
    assert line.status == 401
    assert not hasattr(line, "client")
    assert not hasattr(line, "job_id")


def test_probes_and_scrapes_are_logged_at_debug_while_all_is_well(start, lines):
    server = start()
    for path in ("/livez", "/readyz", "/metrics", "/v1/worker"):
        server.ask("GET", path)
    server.worker.engine.alive = False
    server.ask("GET", "/livez")
    server.wait(lambda: len(lines()) == 5)
    levels = [(record.getMessage(), record.levelname) for record in lines()]
    assert levels == [
        ("GET /livez", "DEBUG"),
        ("GET /readyz", "DEBUG"),
        ("GET /metrics", "DEBUG"),
        ("GET /v1/worker", "INFO"),
        ("GET /livez", "INFO"),
    ]
