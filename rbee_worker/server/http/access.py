"""Access: who may send requests, by host name, API key and origin, and by the number of connections."""

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
"""Paths for probes. They need no API key, take any host name, and are served when there are too many connections."""

EXPOSED_HEADERS: Final = ("X-Correlation-ID", "X-Request-ID", "Retry-After")
"""Response headers that pages of an allowed origin may read."""

MAX_HEADERS: Final = 100
MAX_HEAD_BYTES: Final = 64 * 1024

CROWDED: Final = "crowded"
"""Key in ``scope["state"]``: set when there were too many connections (see ``protocol.py``)."""

_CLIENT = "client"
_OTHER_SITES = frozenset({"cross-site", "same-site"})
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@]+")
_HOST_PATTERN = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def client_of(scope: Scope) -> str:
    """A name of the client that may be logged: the name of its key; without keys, its IP address. Empty: not known."""
    return str(scope.get("state", {}).get(_CLIENT, ""))


class Access:
    """Lets a request pass, or raises.

    :data:`OPEN_PATHS` always pass. On all other paths:

    - If there are keys, the request must have one of them.
    - ``Host`` must be a loopback name of this machine or a trusted host. Without a list of trusted hosts, any name is
      accepted if there are keys or ``allow_unauthenticated`` is set. This stops DNS rebinding: a page whose own name
      was made to lead here sends that name.
    - Without keys, requests that browsers send for pages of other sites are refused, except for allowed origins, and
      except GET and HEAD. Such a page could not read the answer, but it could use the machine or unload the model.
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
            Forbidden: the host name is not accepted, or the request comes from a page of another site.
            HeadersTooLarge: there are too many headers, or they are too long.
            InvalidRequest: the request has both Content-Length and Transfer-Encoding.
            Unavailable: there are too many connections.
        """
        if scope["type"] == "http":
            _check_head(scope)
            headers = Headers(scope=scope)
            state = scope.setdefault("state", {})
            if not self._keys and scope.get("client"):
                address = scope["client"][0]
                state[_CLIENT] = address if _is_address(address) else "unknown"  # a proxy may send any words
            if state.get(CROWDED):
                scope["headers"].append((b"connection", b"close"))  # makes uvicorn close the connection
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
        # Browsers leave out Sec-Fetch-Site on plain HTTP, except for loopback names.
        foreign = site in _OTHER_SITES or (site is None and origin is not None and _authority(origin) != _host(headers))
        if foreign:
            raise Forbidden(
                "Requests from other sites' pages are refused.",
                hint="Allow the page's origin with --cors-origin, or ask for keys with --api-key.",
            )


def cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Middleware that tells browsers that pages of ``origins`` may use the worker. Preflights need no key."""
    return CORSMiddleware(
        app,
        allow_origins=cors_origins(origins),
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=EXPOSED_HEADERS,
    )


def cors_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Check the values of ``--cors-origin``, and return them in lower case.

    Raises:
        InvalidRequest: a value is not an origin.
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
    """Check the values of ``--trusted-host``, and return them in lower case, without brackets.

    Raises:
        InvalidRequest: a value is not a host name.
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
    """The name in a ``Host`` header, in lower case, without the port and the brackets of IPv6."""
    name = header.rpartition(":")[0] if re.search(r":\d+$", header) else header
    return name.removeprefix("[").removesuffix("]").lower()


def is_loopback(name: str) -> bool:
    """Whether a host name always means this machine: localhost, a name below it, or a loopback address."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def matches(name: str, pattern: str) -> bool:
    """Whether a host name matches a pattern: the same name, or ``*.example.org`` for every name below example.org."""
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
        # A proxy may use the other length (RFC 9112, section 6.1), so the bytes that follow are not trusted.
        headers.append((b"connection", b"close"))  # makes uvicorn close the connection
        raise InvalidRequest("The request has both Content-Length and Transfer-Encoding.")


def _authority(origin: str) -> str:
    return origin.partition("://")[2].lower()


def _host(headers: Headers) -> str:
    return headers.get("host", "").lower()
