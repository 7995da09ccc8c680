"""Spans of requests, collected in memory."""

import http.server
import subprocess
import sys
import threading

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from rbee_worker.config import EngineConfig
from rbee_worker.errors import QueueFull
from rbee_worker.server.observe import tracing
from rbee_worker.worker.worker import Worker
from tests.tiny import write_tiny_model

INFERENCE = "/v1/inference"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def collected():
    """An exporter that keeps spans, and the provider that fills it."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter, provider


@pytest.fixture
def _no_variables(monkeypatch):
    for name in (*tracing.ENDPOINTS, "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)


def test_a_request_is_a_span_of_the_callers_trace(start, collected, tmp_path):
    exporter, provider = collected
    worker = Worker(EngineConfig(device="cpu"))
    model = str(write_tiny_model(tmp_path / "tiny"))
    server = start(worker, first_load=lambda: worker.loads.begin(model), app_options={"tracer_provider": provider})
    server.wait(lambda: worker.serves)
    body = {"prompt": "SECRET", "max_tokens": 3, "ignore_eos": True, "temperature": 0.5, "seed": 2**64 - 1}
    reply = server.ask("POST", INFERENCE, {**body, "job_id": "j"}, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    server.wait(exporter.get_finished_spans)
    (span,) = exporter.get_finished_spans()
    assert span.name == "text_completion tiny"
    assert span.kind is SpanKind.SERVER
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    wanted = {
        "http.request.method": "POST",
        "http.route": INFERENCE,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": str(2**64 - 1),
        "gen_ai.response.id": "j",
        "gen_ai.response.finish_reasons": ("max_tokens",),
        "gen_ai.usage.output_tokens": 3,
        "rbee.client": "127.0.0.1",
        "rbee.correlation_id": reply.headers["x-correlation-id"],
    }
    assert wanted.items() <= dict(span.attributes).items()
    assert span.attributes["gen_ai.usage.input_tokens"] >= 1
    assert [event.name for event in span.events] == ["queued", "started", "first token", "end"]
    moments = [span.start_time, *(event.timestamp for event in span.events)]
    assert moments == sorted(moments)
    assert span.events[-1].timestamp <= span.end_time + 10_000_000
    assert "SECRET" not in span.to_json()


def test_a_refusal_and_an_error(start, collected):
    exporter, provider = collected
    server = start(app_options={"tracer_provider": provider})
    server.worker.refusal = QueueFull("full")
    server.ask("POST", INFERENCE, {"prompt": "p"})
    server.worker.refusal = ZeroDivisionError()
    server.ask("POST", INFERENCE, {"prompt": "p"})
    server.wait(lambda: len(exporter.get_finished_spans()) == 2)
    full, broken = exporter.get_finished_spans()
    assert (full.name, full.parent) == (f"POST {INFERENCE}", None)
    assert (full.attributes["http.response.status_code"], full.status.status_code) == (429, StatusCode.UNSET)
    assert (broken.attributes["error.type"], broken.status.status_code) == ("500", StatusCode.ERROR)


def test_probes_make_no_spans_and_the_log_names_the_trace(start, collected, caplog):
    caplog.set_level("INFO")
    exporter, provider = collected
    server = start(app_options={"tracer_provider": provider})
    for path in ("/livez", "/metrics", "/v1/worker"):
        server.ask("GET", path)
    server.wait(lambda: any(record.name == "rbee_worker.access" for record in caplog.records))
    (span,) = exporter.get_finished_spans()
    assert span.attributes["http.route"] == "/v1/worker"
    (line,) = [record for record in caplog.records if record.name == "rbee_worker.access"]
    assert line.trace_id == f"{span.context.trace_id:032x}"


def test_spans_are_sent_before_the_server_ends(start, collected):
    closed = []
    _, provider = collected
    provider.shutdown = lambda: closed.append(1)
    server = start(app_options={"tracer_provider": provider})
    server.stop()
    assert closed == [1]


def test_a_collector_that_hangs_does_not_keep_the_process(start, collected, monkeypatch):
    monkeypatch.setattr(tracing, "SHUTDOWN_SECONDS", 0.1)
    released = threading.Event()
    _, provider = collected
    provider.shutdown = released.wait
    server = start(app_options={"tracer_provider": provider})
    server.stop()  # waits 10 s at most
    released.set()


@pytest.mark.usefixtures("_no_variables")
def test_without_an_endpoint_there_are_no_traces(monkeypatch):
    assert tracing.provider_from_environment() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert tracing.provider_from_environment() is None


@pytest.mark.usefixtures("_no_variables")
def test_without_the_extra_that_is_said(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(tracing, "_installed", lambda _: False)
    assert tracing.provider_from_environment() is None
    assert "pip install '.[otel]'" in caplog.text


def test_what_is_not_installed_is_found_out_without_an_error():
    assert tracing._installed("opentelemetry.sdk")
    assert not tracing._installed("no_such_package.module")


@pytest.mark.usefixtures("_no_variables")
def test_spans_go_to_the_endpoint(monkeypatch, caplog):
    received = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            """Tests print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_address[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        provider = tracing.provider_from_environment()
        provider.get_tracer("test").start_span("a span").end()
        provider.shutdown()
        collector.shutdown()
        thread.join()
    (path, body), *_ = received
    assert path == "/v1/traces"
    assert b"a span" in body
    assert b"rbee-worker" in body
    assert "4318" in caplog.text


def test_opentelemetry_is_imported_only_when_it_is_used():
    program = (
        "import sys, rbee_worker.server.run as run\n"
        "assert run.provider_from_environment() is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    env = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "[]\n"
