"""What happens to every request before and after its route: pure ASGI, so that streams are never buffered.

From the outside in: :class:`RequestLog`, :class:`Errors`, :class:`Auth`, :class:`BodyLimit`.
"""

import hashlib
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee_worker.errors import BodyTooLarge, Forbidden, RbeeError, RequestTimeout, Unauthorized
from rbee_worker.server.responses import error_response

OPEN_PATHS: Final = frozenset({"/", "/health", "/livez", "/readyz", "/v1/ready"})
"""Answered without an API key."""

BODY_SECONDS: Final = 60.0
"""How long a request's body may take to arrive."""

CLIENT_LEFT: Final = 499
"""Status in the log (nginx's) of a request whose client left before an answer."""

correlation_id: ContextVar[str] = ContextVar("correlation_id", default="")
"""The id of the request being served, empty outside one; threads that work for a request inherit it."""

log = logging.getLogger(__name__)
access_log = logging.getLogger("rbee_worker.access")

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_OTHER_SITES = frozenset({"cross-site", "same-site"})
_MAX_LOGGED_PATH = 200
_DISCARD_SECONDS = 5.0


class CorrelationFilter(logging.Filter):
    """Adds ``correlation_id`` to the records made while a request is served; goes on a handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true."""
        if (current := correlation_id.get()) and not hasattr(record, "correlation_id"):
            record.correlation_id = current
        return True


class RequestLog:
    """Gives each request its correlation id, echoes it, and writes one line when the request is over.

    The id is ``X-Correlation-ID`` where that is a UUID, else a new one. ``X-Request-ID`` carries the same value.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

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

        token = correlation_id.set(current)
        try:
            await self.app(scope, receive, tagged)
        finally:
            milliseconds = round((time.perf_counter() - began) * 1000, 1)
            extra = {"correlation_id": current, "status": status, "ms": milliseconds}
            access_log.info("%s %s", scope["method"], _path(scope), extra=extra)
            correlation_id.reset(token)


class Errors:
    """Turns every exception into the response that says it; what is unexpected is logged and stays inside."""

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
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            return
        except RbeeError as raised:
            error = raised
        except Exception:
            log.exception("%s %s failed", scope["method"], _path(scope))
            error = RbeeError("The worker failed; its log says why.")
        else:
            return
        # Once a response has begun there is nothing left to say: returning closes the connection.
        if not started:
            await error_response(scope, error)(scope, receive, send)


class Auth:
    """Asks for one of the API keys; without any, refuses what other sites' pages make a browser send.

    Keys are compared in constant time, each one every time. Without a key only this machine's own names are answered
    to, unless ``any_host``: a page whose own name was made to lead here (DNS rebinding) says that name in ``Host``.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], *, any_host: bool = False) -> None:
        self.app = app
        self._any_host = any_host
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
            Unauthorized: the key is missing or wrong.
            Forbidden: a page of another site sent this through a browser.
        """
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = Headers(scope=scope)
            if self._digests:
                self._check_key(headers.get("authorization", ""))
            elif not self._any_host and not is_loopback_host(headers.get("host", "")):
                raise Forbidden(
                    "Without an API key only this machine's own names are answered to.",
                    hint="Ask for 127.0.0.1 or localhost, or set --api-key or --allow-unauthenticated.",
                )
            elif scope["method"] not in {"GET", "HEAD"} and headers.get("sec-fetch-site") in _OTHER_SITES:
                # Such a page could not read the answer, but it could spend the machine or unload the model.
                raise Forbidden("Requests from other sites' pages are refused.", hint="Set --api-key to allow them.")
        await self.app(scope, receive, send)

    def _check_key(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("The API key is missing or wrong.", hint="Send it as: Authorization: Bearer KEY")


def is_loopback_host(header: str) -> bool:
    """Whether a ``Host`` header names this machine itself: localhost, or a loopback address, with or without a port."""
    name = header.rpartition(":")[0] if re.search(r":\d+$", header) else header
    name = name.removeprefix("[").removesuffix("]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class BodyLimit:
    """Refuses bodies over ``max_bytes``, declared or streamed, and those that take over ``seconds`` to arrive."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float = BODY_SECONDS) -> None:
        self.app = app
        self._max = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
            BodyTooLarge: also while the application reads the body.
            RequestTimeout: while the application reads the body.
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
            if complete:  # what follows the body is the client's leaving, which may take its time
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
        """Read a little more: most clients look at the answer only when they have sent their body."""
        with anyio.move_on_after(_DISCARD_SECONDS):
            size = 0
            more = True
            while more and size <= self._max:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)


def _path(scope: Scope) -> str:
    """The path for a log line: still percent-encoded, so that it cannot forge one; the query is left out."""
    raw: bytes = scope.get("raw_path") or b""
    return raw.decode("ascii", "replace")[:_MAX_LOGGED_PATH]
