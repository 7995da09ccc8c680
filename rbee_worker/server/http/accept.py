"""Acceptor: takes connections from the listening sockets, and no more than the worker can serve.

asyncio's own server accepts everything that waits before it looks at any of it. With more clients than descriptors that
fails once for each of them, and probes wait behind the crowd. It also counts a connection over TLS only once its
handshake is over. Here each connection counts from the moment it is accepted. When there are as many as may be, the one
that has waited longest without asking for anything gives way. When all are busy, a few more are accepted for probes.
"""

import asyncio
import errno
import functools
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from rbee_worker.server.http.protocol import ConnectionLimits, LimitedProtocol

_NOTHING_LEFT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of ``accept`` that pass when others let something go."""

_PATIENCE_SECONDS: Final = 0.2
"""How long a connection may be silent before it gives way to another: a request may be under way."""

_PAUSE_SECONDS: Final = 0.1
_REPORT_SECONDS: Final = 60.0
"""How often the log says that there is nothing left."""

log = logging.getLogger(__name__)


class Acceptor:
    """Accepts connections until it is closed.

    Args:
        make: makes the protocol of a connection, which adds itself to ``connections`` once it has begun.
        connections: those that have begun and have not ended.
        limits: how many there may be; the handshake of TLS must end within the time for a head.
        context: of TLS; None: plain HTTP.
    """

    def __init__(
        self,
        make: Callable[[], LimitedProtocol],
        connections: set[LimitedProtocol],
        limits: ConnectionLimits,
        context: ssl.SSLContext | None,
    ) -> None:
        self._make = make
        self._connections = connections
        self._limits = limits
        self._context = context
        self._opening: dict[LimitedProtocol, asyncio.Task[None]] = {}  # the oldest first
        self._leaving: set[LimitedProtocol] = set()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._reported = float("-inf")

    def start(self, sockets: Sequence[socket.socket]) -> None:
        """Begin to accept."""
        self._tasks = [asyncio.get_running_loop().create_task(self._accept(sock)) for sock in sockets]

    async def close(self) -> None:
        """Accept no more, and end the connections whose handshake is not over."""
        tasks = [*self._tasks, *self._opening.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(sock)
            except ConnectionError:  # the client has left already
                continue
            except OSError as error:
                if error.errno in _NOTHING_LEFT:
                    self._report(error)
                    self._let_one_go()
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            protocol = self._make()
            try:
                await self._make_room()
            except BaseException:
                connection.close()
                raise
            protocol.is_crowded = self._count >= self._limits.connections
            protocol.silent_since = loop.time()
            protocol.changed = self._protocol_changed
            self._opening[protocol] = task = loop.create_task(self._open(protocol, connection))
            task.add_done_callback(functools.partial(self._opened, protocol, connection))

    async def _open(self, protocol: LimitedProtocol, connection: socket.socket) -> None:
        """Begin a connection: with TLS, its handshake."""
        seconds = None if self._context is None else self._limits.header_seconds
        with suppress(OSError):  # the client left, came too late, or spoke no TLS
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol, connection, ssl=self._context, ssl_handshake_timeout=seconds
            )

    def _opened(self, protocol: LimitedProtocol, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._opening.pop(protocol, None)
        self._changed.set()
        if protocol.transport is None:  # it never began
            connection.close()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a connection could not begin", exc_info=error)

    def _protocol_changed(self, protocol: LimitedProtocol) -> None:
        """A connection has begun, has ended, or waits for another request."""
        self._opening.pop(protocol, None)
        if protocol not in self._connections:
            self._leaving.discard(protocol)
        self._changed.set()

    @property
    def _count(self) -> int:
        """Connections that will be there when those that give way are gone."""
        return len(self._connections) - len(self._leaving) + len(self._opening)

    async def _make_room(self) -> None:
        """Wait until there is room for one more; who is silent gives way."""
        if self._count < self._limits.connections or self._let_one_go():
            return
        while self._count >= self._limits.connections + self._limits.spare and not self._let_one_go():
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _PATIENCE_SECONDS)

    def _let_one_go(self) -> bool:
        """End the connection that has waited longest without asking for anything; False: there is none."""
        silent = [connection for connection in self._connections - self._leaving if connection.is_silent]
        oldest = min((*silent, *self._opening), key=lambda connection: connection.silent_since, default=None)
        now = asyncio.get_running_loop().time()
        if oldest is None or now - oldest.silent_since < _PATIENCE_SECONDS:
            return False
        if oldest in self._opening:
            self._opening.pop(oldest).cancel()
        else:
            self._leaving.add(oldest)
            oldest.transport.abort()
        return True

    def _report(self, error: OSError) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            count = len(self._connections) + len(self._opening)
            log.warning(
                "no connection can be accepted beside the %d there are: %s. A lower --max-connections leaves room.",
                count,
                error.strerror or error,
            )
