"""Who may ask: host names, other sites' pages, API keys, and how many at a time."""

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from rbee_worker.config import ServerConfig
from rbee_worker.errors import Forbidden, HeadersTooLarge, InvalidRequest, Unauthorized, Unavailable
from rbee_worker.server.http.keys import ApiKeys

OPEN_PATHS: Final = frozenset({"/", "/health", "/livez", "/readyz", "/v1/ready"})
"""Answered without an API key, under any name, and when there are too many connections: probes ask for them."""

EXPOSED_HEADERS: Final = ("X-Correlation-ID", "X-Request-ID", "Retry-After")
"""What a page of an allowed origin may read of a response's head."""

MAX_HEADERS: Final = 100
MAX_HEAD_BYTES: Final = 64 * 1024

CROWDED: Final = "crowded"
"""Key in ``scope["state"]`` of a request whose connection is one too many (see ``protocol.py``)."""

_CLIENT = "client"
_OTHER_SITES = frozenset({"cross-site", "same-site"})
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@]+")
_HOST_PATTERN = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def client_of(scope: Scope) -> str:
    """A name for whoever sent a request that may be logged: that of the key, or the peer's address without keys."""
    return str(scope.get("state", {}).get(_CLIENT, ""))


class Access:
    """Lets a request through, or says why not.

    - With keys: one of them, on every path but :data:`OPEN_PATHS`.
    - ``Host`` must be one of this machine's own names or a trusted one. Without either a list of those or a key, only
      the former will do: a page whose own name was made to lead here (DNS rebinding) says that name. With a key, or
      with leave to be unauthenticated, any name will do until there is a list.
    - Without keys, what a browser sends for another site's page is refused, but for allowed origins. Such a page could
      not read the answer, but it could spend the machine or unload the model.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: ApiKeys) -> None:
        self.app = app
        self._keys = keys
        self._origins = cors_origins(config.cors_origins)
        self._hosts = host_patterns(config.trusted_hosts)
        self._any_host = not self._hosts and (bool(keys) or config.allow_unauthenticated)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
            Unauthorized: the key is missing or wrong.
            Forbidden: the host's name, or a page of another site.
            HeadersTooLarge: too many headers, or too long ones.
            InvalidRequest: two lengths of the body.
            Unavailable: too many connections.
        """
        if scope["type"] == "http":
            _check_head(scope)
            headers = Headers(scope=scope)
            state = scope.setdefault("state", {})
            if not self._keys and scope.get("client"):
                state[_CLIENT] = scope["client"][0]
            if state.get(CROWDED):
                scope["headers"].append((b"connection", b"close"))  # uvicorn then answers the same
            if scope["path"] not in OPEN_PATHS:
                if state.get(CROWDED):
                    raise Unavailable("There are too many connections.", retry_after=1)
                self._check_host(headers.get("host", ""))
                if self._keys:
                    state[_CLIENT] = self._check_key(headers.get("authorization", ""))
                elif scope["method"] not in {"GET", "HEAD"}:
                    self._check_site(headers)
        await self.app(scope, receive, send)

    def _check_key(self, header: str) -> str:
        scheme, _, key = header.partition(" ")
        client = self._keys.client(key.strip().encode("latin-1"))  # the bytes that were sent
        if scheme.lower() != "bearer" or client is None:
            raise Unauthorized("The API key is missing or wrong.", hint="Send it as: Authorization: Bearer KEY")
        return client

    def _check_host(self, header: str) -> None:
        name = host_name(header)
        if self._any_host or is_loopback(name) or any(matches(name, pattern) for pattern in self._hosts):
            return
        if self._hosts:
            hint = "Name it with --trusted-host."
            raise Forbidden("This worker is not to be asked under that name.", hint=hint)
        raise Forbidden(
            "Without an API key only this machine's own names are answered to.",
            hint="Ask for 127.0.0.1 or localhost, or set --api-key, --trusted-host or --allow-unauthenticated.",
        )

    def _check_site(self, headers: Headers) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and ("*" in self._origins or origin.lower() in self._origins):
            return
        # Browsers leave Sec-Fetch-Site out where the worker is asked over plain HTTP under a name of its own.
        foreign = site in _OTHER_SITES or (site is None and origin is not None and _authority(origin) != _host(headers))
        if foreign:
            raise Forbidden(
                "Requests from other sites' pages are refused.",
                hint="Allow the page's origin with --cors-origin, or ask for keys with --api-key.",
            )


def cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Tells browsers that pages of ``origins`` may use the worker; preflights are answered here, without a key."""
    return CORSMiddleware(
        app,
        allow_origins=cors_origins(origins),
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=EXPOSED_HEADERS,
    )


def cors_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """``--cors-origin``, checked.

    Raises:
        InvalidRequest: one is no origin.
    """
    lowered = tuple(origin.lower() for origin in origins)
    for origin in lowered:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise InvalidRequest(
                f"--cors-origin {origin!r} is no origin.",
                hint="Write scheme://host or scheme://host:port, without a path or a slash at the end, or '*'.",
            )
    return lowered


def host_patterns(hosts: Sequence[str]) -> tuple[str, ...]:
    """``--trusted-host``, checked.

    Raises:
        InvalidRequest: one is no name.
    """
    lowered = tuple(host.lower().removeprefix("[").removesuffix("]") for host in hosts)
    for host in lowered:
        if not _HOST_PATTERN.fullmatch(host) and not _is_address(host):
            raise InvalidRequest(
                f"--trusted-host {host!r} is no host name.",
                hint="Write a name or an address without a port, or *.example.org for every name below example.org.",
            )
    return lowered


def host_name(header: str) -> str:
    """The name in a ``Host`` header: without the port and the brackets of IPv6, in lower case."""
    name = header.rpartition(":")[0] if re.search(r":\d+$", header) else header
    return name.removeprefix("[").removesuffix("]").lower()


def is_loopback(name: str) -> bool:
    """Whether a host name is this machine's own: localhost, or a loopback address."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is ``name``, or ``*.`` and what ``name`` ends with after a dot."""
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_head(scope: Scope) -> None:
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers) + len(scope.get("raw_path") or b"")
    if len(headers) > MAX_HEADERS or size > MAX_HEAD_BYTES:
        raise HeadersTooLarge(f"The request's head is over {MAX_HEADERS} headers or {MAX_HEAD_BYTES} bytes.")
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        # A proxy may have read another length than this worker (RFC 9112, section 6.1): what follows is not trusted.
        headers.append((b"connection", b"close"))  # uvicorn then answers the same
        raise InvalidRequest("The request has both Content-Length and Transfer-Encoding.")


def _authority(origin: str) -> str:
    return origin.partition("://")[2].lower()


def _host(headers: Headers) -> str:
    return headers.get("host", "").lower()
