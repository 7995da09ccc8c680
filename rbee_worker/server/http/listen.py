"""Binds the server's addresses, before anything else starts, and refuses those that need a key."""

import errno
import ipaddress
import os
import socket
from typing import NamedTuple

from rbee_worker.address import HostPort
from rbee_worker.config import ServerConfig
from rbee_worker.errors import InvalidRequest, RbeeError

BACKLOG = 2048

_ABSENT = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""Errors for an address family that this machine lacks. A name such as localhost may have an address of another."""


class Address(NamedTuple):
    """One address of a host name. ``sockaddr`` is what ``socket.bind`` takes."""

    family: socket.AddressFamily
    ip: str
    sockaddr: tuple[str | int, ...]


def listen(config: ServerConfig) -> list[socket.socket]:
    """Listening sockets, one for each address of ``config.host``, all on the same port.

    Without an API key only loopback addresses are bound, unless ``allow_unauthenticated`` is set.

    Raises:
        InvalidRequest: the address may not be bound without a key (exit code 2), or the host name is unknown.
        RbeeError: the address cannot be bound, for example because the port is taken (exit code 1).
    """
    addresses = _resolve(config.host, config.port)
    if not config.api_keys and config.api_key_file is None and not config.allow_unauthenticated:
        for address in addresses:
            if not ipaddress.ip_address(address.ip).is_loopback:
                raise InvalidRequest(
                    f"{HostPort(config.host, config.port)} can be reached from other machines, and no API key is set.",
                    hint="Set one with --api-key or RBEE_API_KEY, bind 127.0.0.1, or say --allow-unauthenticated.",
                )
    if config.port == 0:
        addresses = addresses[:1]  # a port that is free for one address may be taken for another
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    for address in addresses:
        try:
            sockets.append(_bind(address, dual_stack=len(addresses) == 1))
        except OSError as error:
            if error.errno not in _ABSENT:
                for sock in sockets:
                    sock.close()
                raise _cannot_bind(HostPort(address.ip, config.port), error) from None
            absent = error
    if not sockets and absent is not None:
        raise _cannot_bind(HostPort(config.host, config.port), absent)
    return sockets


def url(sockets: list[socket.socket], scheme: str = "http") -> str:
    """The URL of the first socket."""
    host, port, *_ = sockets[0].getsockname()
    return f"{scheme}://{HostPort(host, port)}"


def _resolve(host: str, port: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        hint = "Use an address of this machine, such as 127.0.0.1, or a name that stands for one."
        raise InvalidRequest(f"The host name {host!r} is unknown: {error}.", hint=hint) from None
    # IPv4 first: the first address is printed, and every client can use IPv4.
    found.sort(key=lambda info: info[0] != socket.AF_INET)
    unique: dict[str, Address] = {}
    for family, _, _, _, sockaddr in found:
        ip = str(sockaddr[0])
        unique.setdefault(ip, Address(family, ip.partition("%")[0], (ip, port, *sockaddr[2:])))
    return list(unique.values())


def _bind(address: Address, *, dual_stack: bool) -> socket.socket:
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not dual_stack))
        # Connections inherit this. It detects peers that vanish during a long silence.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.bind(address.sockaddr)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _cannot_bind(address: HostPort, error: OSError) -> RbeeError:
    if error.errno == errno.EADDRINUSE:
        hint = "Stop what listens there, or choose another port with --addr (port 0 takes a free one)."
        return RbeeError(f"{address} is taken by another process.", hint=hint)
    reason = os.strerror(error.errno) if error.errno else str(error)
    return RbeeError(f"{address} cannot be bound: {reason}.", hint="Choose an address of this machine with --addr.")
