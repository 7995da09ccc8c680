"""Traces with OpenTelemetry: a span for each request, with the main moments of its jobs as events.

It needs the ``otel`` extra, and an endpoint in OpenTelemetry's environment variables. Without them requests are not
traced. Attributes follow the semantic conventions for HTTP and generative AI. None of them holds text.
"""

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import anyio.to_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee_worker import __version__
from rbee_worker.events import End, InferenceFailed
from rbee_worker.server.http.access import client_of
from rbee_worker.server.http.middleware import QUIET_PATHS, correlation_id, route_of, stop_reason, tokens_of
from rbee_worker.worker.job import Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Environment variables with the address for spans. Without one of them no spans are made."""

SHUTDOWN_SECONDS: Final = 3.0
"""How long it may take at the end to send the last spans."""

_MODULES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")

log = logging.getLogger(__name__)


def provider_from_environment() -> "TracerProvider | None":
    """A provider that makes spans and sends them to the endpoint in the environment.

    OpenTelemetry's variables also set the sampler, the service's name and the headers.

    Returns:
        None: the environment names no endpoint or turns traces off, or OpenTelemetry is not installed.
    """
    environ = os.environ
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    if off or not any(environ.get(name) for name in ENDPOINTS):
        return None
    if not all(_installed(module) for module in _MODULES):
        log.warning("no traces: OpenTelemetry is not installed; in a checkout of rbee-worker: pip install '.[otel]'")
        return None
    if environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")) == "grpc":
        log.warning("traces are sent by http/protobuf, not by grpc; collectors take that on port 4318")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - optional
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    attributes: dict[str, str] = {"service.version": __version__}
    if not environ.get("OTEL_SERVICE_NAME") and "service.name=" not in environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes["service.name"] = "rbee-worker"
    # shut_down() ends it within a time limit. At exit it would be shut down once more, without a limit.
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


async def shut_down(provider: "TracerProvider") -> None:
    """Send the remaining spans, but wait only a few seconds, so that a collector that hangs does not stop the exit."""
    thread = threading.Thread(target=provider.shutdown, name="tracing", daemon=True)
    thread.start()
    await anyio.to_thread.run_sync(thread.join, SHUTDOWN_SECONDS)


class Tracing:
    """Makes a span for each request, in the caller's trace (``traceparent``). Probes and scrapes get none."""

    def __init__(self, app: ASGIApp, provider: "TracerProvider") -> None:
        from opentelemetry import propagate, trace  # noqa: PLC0415 - optional

        self.app = app
        self._tracer = provider.get_tracer("rbee_worker", __version__)
        self._extract = propagate.extract
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            await self.app(scope, receive, send)
            return
        status: int | None = None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        route = route_of(scope)
        span = self._tracer.start_span(
            f"{scope['method']} {route}",
            context=self._extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "http.route": route,
                "url.scheme": scope["scheme"],
                "rbee.correlation_id": correlation_id.get(),
            },
        )
        context = span.get_span_context()
        if context.is_valid:
            scope["state"]["trace_id"] = self._trace.format_trace_id(context.trace_id)
        try:
            with self._trace.use_span(span):
                await self.app(scope, receive, watched)
        finally:
            self._finish(span, scope, status)
            span.end()

    def _finish(self, span: "Span", scope: Scope, status: int | None) -> None:
        jobs: Sequence[Job] = scope["state"]["jobs"]
        if client := client_of(scope):
            span.set_attribute("rbee.client", client)
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if jobs:
            span.update_name(f"{_operation(jobs[0])} {_model(jobs)}".rstrip())
            span.set_attributes(_attributes(jobs))
            for job in jobs:
                _add_events(span, job)
        failed = next((job.ended.code for job in jobs if isinstance(job.ended, InferenceFailed)), None)
        if failed is not None or (status or 0) >= 500:  # noqa: PLR2004 - HTTP's class of errors
            span.set_attribute("error.type", failed or str(status))
            span.set_status(self._trace.StatusCode.ERROR)


def _attributes(jobs: Sequence[Job]) -> dict[str, Any]:
    """The attributes of the conventions for generative AI, for all jobs of a request together."""
    params = jobs[0].request.sampling
    tokens_in, tokens_out = tokens_of(jobs)
    found = {
        "gen_ai.operation.name": _operation(jobs[0]),
        "gen_ai.provider.name": "rbee",
        "gen_ai.request.model": _model(jobs),
        "gen_ai.response.model": _model(jobs),
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.choice.count": len(jobs) if len(jobs) > 1 else None,
        "gen_ai.response.id": jobs[0].id,
        "gen_ai.response.finish_reasons": [stop_reason(job) for job in jobs],
        "gen_ai.usage.input_tokens": tokens_in,
        "gen_ai.usage.output_tokens": tokens_out,
        "gen_ai.usage.cache_read.input_tokens": sum(
            job.ended.cached_tokens for job in jobs if isinstance(job.ended, End)
        ),
    }
    # Seeds may be up to 2**64 - 1, but attributes are signed 64-bit integers.
    return {name: str(v) if isinstance(v, int) and v >= 2**63 else v for name, v in found.items() if v is not None}


def _add_events(span: "Span", job: Job) -> None:
    epoch = time.time_ns() - time.monotonic_ns()
    moments = (
        ("queued", job.submitted_at),
        ("started", job.started_at),
        ("first token", job.first_at),
        ("end", job.ended_at),
    )
    for name, seconds in moments:
        if seconds:
            span.add_event(name, {"rbee.job_id": job.id}, timestamp=epoch + int(seconds * 1e9))


def _operation(job: Job) -> str:
    return "text_completion" if job.request.messages is None else "chat"


def _model(jobs: Sequence[Job]) -> str:
    return next((job.started.model for job in jobs if job.started is not None), "")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it is missing
        return False
