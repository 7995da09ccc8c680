"""Middleware for all requests. It is pure ASGI, so that streams are never buffered.

The order from the outside in: uvicorn's for the headers of proxies, :class:`RequestLog`, ``tracing.Tracing``,
``access.cors``, :class:`Errors`, ``access.Access``, :class:`BodyLimit`.
"""

import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Final, Protocol

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee_worker.errors import BodyTooLarge, RbeeError, RequestTimeout
from rbee_worker.events import End
from rbee_worker.panics import panics_as_errors
from rbee_worker.server.http.access import OPEN_PATHS, client_of
from rbee_worker.server.http.envelope import error_response
from rbee_worker.worker.job import Job, submitted_jobs

QUIET_PATHS: Final = OPEN_PATHS | {"/metrics"}
"""Paths that programs request every few seconds. Successful requests for them are logged only at ``debug``."""

OTHER_ROUTES: Final = "other"
"""The name for paths without a route, and for other methods than HTTP's usual ones."""

CLIENT_LEFT: Final = 499
"""The status, in the log, of a request whose client left before an answer began. nginx uses the same."""

correlation_id: ContextVar[str] = ContextVar("correlation_id", default="")
"""The id of the request that is being served; empty outside of requests. Threads that work for a request inherit it."""

log = logging.getLogger(__name__)
access_log = logging.getLogger("rbee_worker.access")

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_MAX_LOGGED_PATH = 200
_MAX_LOGGED_METHOD = 20
_DISCARD_SECONDS = 5.0


class CorrelationFilter(logging.Filter):
    """Adds ``correlation_id`` to log records that are made while a request is served. For a log handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the id. Always returns true."""
        if (current := correlation_id.get()) and not hasattr(record, "correlation_id"):
            record.correlation_id = current
        return True


class ResponseCounter(Protocol):
    """Counts responses; see :meth:`rbee_worker.server.observe.metrics.WorkerMetrics.responded`."""

    def responded(self, method: str, route: str, status: int) -> None:
        """Count one response."""


class RequestLog:
    """Gives each request a correlation id. At its end, writes one log line and counts the response.

    The id is the request's ``X-Correlation-ID`` if that is a UUID, else a new one. The response has it as
    ``X-Correlation-ID`` and as ``X-Request-ID``. ``scope["state"]["jobs"]`` is the list of the request's jobs.
    """

    def __init__(self, app: ASGIApp, counter: ResponseCounter) -> None:
        self.app = app
        self._counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-correlation-id", "")
        current = given if _UUID.fullmatch(given) else str(uuid.uuid4())
        echoed = [(b"x-correlation-id", current.encode()), (b"x-request-id", current.encode())]
        status = CLIENT_LEFT
        began = time.perf_counter()

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *echoed]}
            await send(message)

        jobs: list[Job] = []
        scope.setdefault("state", {})["jobs"] = jobs
        token, jobs_token = correlation_id.set(current), submitted_jobs.set(jobs)
        try:
            await self.app(scope, receive, tagged)
        finally:
            milliseconds = round((time.perf_counter() - began) * 1000, 1)
            extra = {"correlation_id": current, "status": status, "ms": milliseconds} | _described(scope, jobs)
            quiet = scope["path"] in QUIET_PATHS and status < 400  # noqa: PLR2004 - HTTP's class of errors
            level = logging.DEBUG if quiet else logging.INFO
            access_log.log(level, "%s %s", scope["method"][:_MAX_LOGGED_METHOD], _path(scope), extra=extra)
            method = scope["method"] if scope["method"] in _METHODS else OTHER_ROUTES
            self._counter.responded(method, route_of(scope), status)
            submitted_jobs.reset(jobs_token)
            correlation_id.reset(token)


class Errors:
    """Turns every exception into a response. An unexpected one is logged, and the response does not show it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            with panics_as_errors():
                await self.app(scope, receive, watched)
        except ClientDisconnect:
            return
        except RbeeError as raised:
            error = raised
        except Exception:
            log.exception("%s %s failed", scope["method"][:_MAX_LOGGED_METHOD], _path(scope))
            error = RbeeError("The worker failed; its log says why.")
        else:
            return
        # If a response has begun, no other can be sent. Returning closes the connection.
        if not started:
            await error_response(scope, error)(scope, receive, send)


class BodyLimit:
    """Refuses bodies larger than ``max_bytes``, and bodies that take longer than ``seconds`` to arrive."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app = app
        self._max = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
            BodyTooLarge: the body is too large; may be raised while the application reads it.
            RequestTimeout: the body takes too long; raised while the application reads it.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if int(headers.get("content-length", "0")) > self._max:
            if "expect" not in headers:
                await self._discard(receive)
            raise self._too_large()
        size = 0
        complete = False
        deadline: float | None = None

        async def limited() -> Message:
            nonlocal size, complete, deadline
            if complete:  # after the body comes the message that the client has left; it has no deadline
                return await receive()
            deadline = deadline or anyio.current_time() + self._seconds
            try:
                with anyio.fail_after(deadline - anyio.current_time()):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeout(f"The request's body did not arrive within {self._seconds:g} s.") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self._max:
                if not complete:
                    await self._discard(receive)
                raise self._too_large()
            return message

        await self.app(scope, limited, send)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The request's body is over {self._max} bytes.")

    async def _discard(self, receive: Receive) -> None:
        """Read some more of the body, because most clients read the answer only after sending the whole body."""
        with anyio.move_on_after(_DISCARD_SECONDS):
            size = 0
            more = True
            while more and size <= self._max:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)


def _path(scope: Scope) -> str:
    """The path for a log line, without the query. It stays percent-encoded, so that it cannot make a second line."""
    raw: bytes = scope.get("raw_path") or b""
    return raw.decode("ascii", "replace")[:_MAX_LOGGED_PATH]


def route_of(scope: Scope) -> str:
    """The pattern of a request's route, such as ``/v1/inference/{job_id}``; ``other``: no route has this path."""
    found = OTHER_ROUTES
    for route in scope["app"].routes:
        if isinstance(route, Route):
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return route.path_format
            if match is Match.PARTIAL:
                found = route.path_format
    return found


def stop_reason(job: Job) -> str:
    """Why a job ended: the stop reason of its ``end``, or the code of its ``error``; ``cancelled`` without either."""
    if job.ended is None:
        return "cancelled"
    return job.ended.stop_reason if isinstance(job.ended, End) else job.ended.code


def tokens_of(jobs: Sequence[Job]) -> tuple[int, int]:
    """Prompt tokens and generated tokens of all jobs. For a job that has not ended, ``token`` events are counted."""
    tokens_in = sum(job.started.prompt_tokens for job in jobs if job.started is not None)
    tokens_out = sum(job.ended.tokens_out if isinstance(job.ended, End) else job.texts for job in jobs)
    return tokens_in, tokens_out


def _described(scope: Scope, jobs: Sequence[Job]) -> dict[str, Any]:
    """More fields for the log line: the client, the trace id, and what became of the jobs; never any text."""
    extra: dict[str, Any] = {}
    if client := client_of(scope):
        extra["client"] = client
    if trace_id := scope["state"].get("trace_id"):
        extra["trace_id"] = trace_id
    if jobs:
        extra["job_id"] = ",".join(job.id for job in jobs)
        extra["tokens_in"], extra["tokens_out"] = tokens_of(jobs)
        extra["stop_reason"] = ",".join(dict.fromkeys(map(stop_reason, jobs)))
    return extra
