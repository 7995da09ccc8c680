"""HTTP/1.1 on a connection, with limits that uvicorn's own protocol lacks.

uvicorn has no time limit for the head of a request, and it answers bytes that are not HTTP in plain text. Here a head
must arrive in time, and all errors are sent as the error envelope. Connections are counted. Those beyond the limit are
served only health and readiness, so that probes do not restart the worker because it has many clients. ``accept.py``
makes the connections, and chooses which of them gives way when there are too many.
"""

import asyncio
import contextlib
import json
import socket
import sys
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from rbee_worker.errors import HeadersTooLarge, InvalidRequest, RbeeError, RequestTimeout
from rbee_worker.server.http.access import CROWDED
from rbee_worker.server.http.envelope import envelope

if TYPE_CHECKING:
    from collections.abc import Callable

SPARE_CONNECTIONS: Final = 256
"""Connections beyond the limit that still get an answer."""

OTHER_FILES: Final = 128
"""Files open beside the connections: the model's, logs, libraries."""


class ConnectionLimits(NamedTuple):
    """Limits of connections.

    Attributes:
        connections: how many are served at a time.
        header_seconds: how long the head of a request may take, from its first byte to its last. For the first request
            the time begins when the client connects.
        spare: how many more are answered, on the paths of probes alone.
    """

    connections: int
    header_seconds: float
    spare: int = SPARE_CONNECTIONS

    def within(self, files: int) -> Self:
        """Limits that leave room for other files where only ``files`` may be open."""
        others = min(OTHER_FILES, files * 3 // 4)
        spare = max(min(self.spare, (files - others) // 4), 1)
        return self._replace(connections=max(min(self.connections, files - others - spare), 1), spare=spare)


def limited(limits: ConnectionLimits) -> type[H11Protocol]:
    """A protocol class with these limits. uvicorn takes a class, and makes an instance for each connection."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})


class LimitedProtocol(H11Protocol):
    """One connection.

    Attributes:
        is_crowded: whether it is one too many, so that only probes are answered on it.
        silent_since: the loop's time when it was accepted, or its latest answer ended.
        changed: called when it has begun, when it waits for another request, and when it has ended.
    """

    limits = ConnectionLimits(connections=4096, header_seconds=20.0)
    is_crowded = False
    silent_since = 0.0
    changed: "Callable[[LimitedProtocol], None]" = staticmethod(lambda _: None)
    _head_timer: asyncio.TimerHandle | None = None

    @property
    def is_silent(self) -> bool:
        """Whether no request is there: its head has not begun, or is not complete."""
        return self.conn.their_state is h11.IDLE

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Count the connection, and wait for its first request."""
        super().connection_made(transport)
        self.changed(self)
        if self.is_crowded:
            self.app_state = {**self.app_state, CROWDED: True}
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes. If a head has begun, start its time limit; if it is complete, stop the limit."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._await_head()
        else:
            self._head_arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time limit."""
        self._head_arrived()
        super().connection_lost(exc)
        self.changed(self)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.silent_since = self.loop.time()
        super().on_response_complete()
        self.changed(self)

    def shutdown(self) -> None:
        """End it: at once when it is idle, else behind its answer; called when the server stops."""
        super().shutdown()
        self._part()

    def timeout_keep_alive_handler(self) -> None:
        """End it: no request came for too long."""
        super().timeout_keep_alive_handler()
        self._part()

    def _part(self) -> None:
        """Do not wait for an idle client once the connection is closed.

        Over TLS the transport says goodbye and then waits for the client's goodbye (30 s), which an idle client never
        sends: it does not read. Nothing obliges a server to wait, so once all is written, reading is ended, upon which
        the transport closes.
        """
        encrypted = self.transport.get_extra_info("ssl_object") is not None
        if encrypted and self.transport.is_closing() and not self.transport.get_write_buffer_size():
            with contextlib.suppress(OSError):  # the client was faster
                self.transport.get_extra_info("socket").shutdown(socket.SHUT_RD)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP. uvicorn calls this while it handles the parser's error."""
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
        else:  # no byte has come, so there is nothing to answer
            self.transport.close()
            self._part()

    def _refuse(self, error: RbeeError) -> None:
        """Answer outside of any request, and close the connection."""
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.close()  # another answer has begun, so this one cannot be sent
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
