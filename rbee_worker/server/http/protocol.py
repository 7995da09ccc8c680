"""HTTP/1.1 on a connection, with the limits that uvicorn's own protocol lacks.

uvicorn waits for a request's head for ever, and answers what is no HTTP in plain text with status 400. Here a head
must arrive within a time, and everything is answered with the error envelope. Every connection counts; those over
the limit are served health and readiness only, so that crowds of clients do not make probes restart the worker.
"""

import asyncio
import json
import sys
from typing import Final, NamedTuple

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from rbee_worker.errors import HeadersTooLarge, InvalidRequest, RbeeError, RequestTimeout
from rbee_worker.server.http.access import CROWDED
from rbee_worker.server.http.envelope import envelope

SPARE_CONNECTIONS: Final = 256
"""Connections beyond the limit that are still answered, if only with a refusal; more are cut at once."""


class ConnectionLimits(NamedTuple):
    """What a connection may take.

    Attributes:
        connections: served at a time.
        header_seconds: from the first byte of a request's head (of the first request: from connecting) to its last.
    """

    connections: int
    header_seconds: float


def limited(limits: ConnectionLimits) -> type[H11Protocol]:
    """The protocol class for uvicorn, which makes its instances itself."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})


class LimitedProtocol(H11Protocol):
    """One connection."""

    limits = ConnectionLimits(connections=4096, header_seconds=20.0)
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Count it, and wait for its first request."""
        super().connection_made(transport)
        over = len(self.connections) - self.limits.connections
        if over > SPARE_CONNECTIONS:
            transport.abort()
            return
        if over > 0:
            self.app_state = {**self.app_state, CROWDED: True}
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes in; a head that has begun must be whole in time."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._await_head()
        else:
            self._head_arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._head_arrived()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; called while the parser's error is being handled."""
        status = getattr(sys.exception(), "error_status_hint", InvalidRequest.http_status)
        if status == HeadersTooLarge.http_status:
            self._refuse(HeadersTooLarge("The request's head is too large."))
        else:
            self._refuse(InvalidRequest(msg))

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_seconds, self._head_is_late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            seconds = self.limits.header_seconds
            self._refuse(RequestTimeout(f"The request's head did not arrive within {seconds:g} s."))
        else:  # connected and silent: there is nothing to answer
            self.transport.close()

    def _refuse(self, error: RbeeError) -> None:
        """Answer outside any request, and close."""
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.close()  # its request has been answered, or is being: there is no room for another answer
            return
        body = json.dumps(envelope(error)).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        status = error.http_status
        head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
