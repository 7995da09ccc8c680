"""Reads ``--addr``: a worker's address, to bind or to reach."""

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from rbee_worker.errors import InvalidRequest

MAX_PORT = 65535

DIRECT: Mapping[str, None] = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}
"""For clients of HTTP: a proxy set in the environment is not used for addresses of this machine."""


class HostPort(NamedTuple):
    """A host (an IPv6 address without its brackets) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_host_port(text: str) -> HostPort:
    """Parse ``HOST:PORT``, ``:PORT`` (every IPv4 interface) or ``[IPV6]:PORT``.

    Raises:
        InvalidRequest: the text is none of these, or the port is not a number from 0 to 65535.
    """
    host, colon, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise InvalidRequest(f"--addr {text}: an IPv6 address goes in brackets.", hint="For example: --addr [::1]:8080")
    host = host[1:-1] if bracketed else host
    # isascii, because int() also reads digits of other scripts.
    if not colon or not port.isascii() or not port.isdigit() or int(port) > MAX_PORT or any(c in host for c in "[]/@ "):
        hint = f"A host and a port from 0 to {MAX_PORT}, for example: --addr 127.0.0.1:8080"
        raise InvalidRequest(f"--addr {text}: this is not HOST:PORT.", hint=hint)
    return HostPort(host or "0.0.0.0", int(port))  # noqa: S104 - the usual meaning of ":8080"


def parse_base_url(text: str) -> str:
    """The base URL for ``HOST:PORT`` or an ``http(s)://`` URL, without a slash at its end.

    A path is kept, for a worker behind a proxy.

    Raises:
        InvalidRequest: the text is neither.
    """
    text = text.strip()
    if "://" not in text:
        address = parse_host_port(text)
        # People also give the address to which the worker is bound. "Every interface" is reached over loopback.
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
        return f"http://{HostPort(loopback.get(address.host, address.host), address.port)}"
    hint = "For example: --addr 127.0.0.1:8080 or --addr https://worker.example"
    try:
        parts = urlsplit(text)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number, or brackets do not match
        valid = False
    if not valid or parts.query or parts.fragment:
        raise InvalidRequest(f"--addr {text}: this is neither HOST:PORT nor an http:// or https:// URL.", hint=hint)
    return text.rstrip("/")
