"""Subscribes to a server's stream as clients do: at once, late, slowly, in the middle, and leaving early."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from rbee_worker.address import DIRECT, parse_base_url
from rbee_worker.conformance.frames import FrameCheck, check_headers
from rbee_worker.conformance.order import Event, Faults, Finding
from rbee_worker.escape import one_line, reason

LOADING = "/v1/loading"
PROGRESS = "/v1/loading/progress"

LATE_SECONDS = 5.0
"""Within this a stream whose load is over is told and closed."""

_SMALL_BUFFER = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)]


@dataclass(frozen=True, slots=True)
class Server:
    """Where the stream is.

    Attributes:
        addr: ``HOST:PORT`` or a URL.
        api_key: sent with every request; None: no key.
        path: of the stream.
        keep_alive: seconds of silence after which the server sends a comment; 0: it sends none.
    """

    addr: str
    api_key: str | None = None
    path: str = PROGRESS
    keep_alive: float = 10.0

    @property
    def patience(self) -> float:
        """Seconds of silence after which a stream is given up."""
        return 3 * self.keep_alive + 2 if self.keep_alive else 600.0

    def client(self, *, slow: bool = False) -> httpx.Client:
        """A client with a connection of its own; ``slow``: the system takes few bytes for it.

        Raises:
            InvalidRequest: ``addr`` is no address.
        """
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Cache-Control": "no-store"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return httpx.Client(
            base_url=parse_base_url(self.addr),
            headers=headers,
            timeout=httpx.Timeout(self.patience, connect=5.0),
            mounts=DIRECT,
            transport=httpx.HTTPTransport(socket_options=_SMALL_BUFFER) if slow else None,
        )


class Subscriber:
    """One subscription, from its request on. It reads nothing until :meth:`read` or :meth:`follow`.

    Attributes:
        findings: what was found, once it has ended.
        seen: the events so far.
    """

    def __init__(self, server: Server, *, slow: bool = False) -> None:
        """Send the request and wait for the answer's head.

        Raises:
            httpx.HTTPError: nobody answers.
        """
        self.findings: list[Finding] = []
        self._client = server.client(slow=slow)
        try:
            request = self._client.build_request("GET", server.path)
            self._response = self._client.send(request, stream=True)
        except BaseException:
            self._client.close()
            raise
        self.status = self._response.status_code
        keep_alive = 0.0 if slow else server.keep_alive
        self._check = FrameCheck(gaps=slow, keep_alive=keep_alive, opened=time.monotonic())
        self._thread: threading.Thread | None = None
        self._news = threading.Condition()
        self._over = False

    @property
    def seen(self) -> list[Event]:
        """The events so far."""
        return self._check.order.events

    @property
    def headers(self) -> Mapping[str, str]:
        """Those of the answer."""
        return self._response.headers

    def leave(self) -> None:
        """Close the connection."""
        self._response.close()
        self._client.close()

    def leave_early(self) -> None:
        """Read some bytes, then close the connection."""
        with suppress(httpx.HTTPError):
            next(self._response.iter_raw(), b"")
        self.leave()

    def read(self) -> None:
        """Read to the end."""
        closed, what = True, "after it, the stream ended"
        try:
            for data in self._response.iter_raw():
                with self._news:
                    self._check.feed(data, time.monotonic())
                    self._news.notify_all()
        except httpx.ReadTimeout:
            closed, what = False, "nothing came for long, and the stream stays open"
        except (httpx.HTTPError, httpx.StreamError, ValueError) as error:
            closed, what = False, reason(error)
        finally:
            self.leave()
            findings = [check_headers(self.headers), *self._check.end(closed=closed, what=what)]
            with self._news:
                self.findings, self._over = findings, True
                self._news.notify_all()

    def follow(self) -> None:
        """Read to the end on a thread."""
        self._thread = threading.Thread(target=self.read, name="subscriber", daemon=True)
        self._thread.start()

    def wait(self, events: int) -> None:
        """Wait until this many events have come, or the stream has ended."""
        with self._news:
            self._news.wait_for(lambda: self._over or len(self.seen) >= events)

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not None:
            self._thread.join()


Told = tuple[str, Finding]
"""The subscriber, and what was found."""


def examine(server: Server, model: str | None = None) -> Iterator[Told]:
    """Everything that can be seen of a server's stream from outside, as it is found.

    Args:
        server: where the stream is.
        model: loaded first; None: whatever loads there, or has loaded, is watched.

    Raises:
        InvalidRequest: the server's address is none.
    """
    try:
        if model is not None:
            begun = _begin(server, model)
            yield "load", begun
            if begun.ok is False:
                return
        first = Subscriber(server)
        if first.status != httpx.codes.OK:
            yield "first", _refusal(first)
            first.leave()
            return
        yield from _streams(server, first)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield "first", Finding("status", ok=False, detail=f"the server cannot be reached: {reason(error)}")


def _begin(server: Server, model: str) -> Finding:
    with server.client() as client:
        answer = client.post(LOADING, json={"model": model}, headers={"Accept": "application/json"})
    accepted = answer.status_code == httpx.codes.ACCEPTED
    told = "" if accepted else f": {one_line(answer.text)}"
    return Finding("accepted", ok=accepted, detail=f"POST {LOADING} was answered {answer.status_code}{told}")


def _refusal(first: Subscriber) -> Finding:
    detail = f"the stream was answered {first.status}"
    if first.status == httpx.codes.SERVICE_UNAVAILABLE:
        after = first.headers.get("retry-after")
        detail += ": nothing was loaded there" + (f", Retry-After {after}" if after else ", without Retry-After")
    return Finding("status", ok=False, detail=detail)


def _streams(server: Server, first: Subscriber) -> Iterator[Told]:
    slow = Subscriber(server, slow=True)
    first.follow()
    Subscriber(server).leave_early()
    first.wait(2)
    before = list(first.seen)
    joined = Subscriber(server)
    joined.follow()
    first.join()
    joined.join()
    slow.read()
    asked = time.monotonic()
    late = Subscriber(server)
    late.read()
    took = time.monotonic() - asked
    for name, one in (("first", first), ("joined", joined), ("slow", slow), ("late", late)):
        yield from ((name, found) for found in one.findings)
        if name == "joined":
            yield name, _state(before, joined.seen)
            yield name, _complete(first.seen, joined.seen)
        if name != "first":
            yield name, _same_end(first.seen, one.seen)
    yield "late", _late(first.seen, late.seen, took)
    yield "leaving", _left(first.seen)


def _seq(event: Event) -> int:
    seq = event.get("seq")
    return seq if isinstance(seq, int) else -1


def _counts(events: list[Event]) -> list[Event]:
    return [event for event in events if event.get("stage") == "loading_to_vram"]


def _state(before: list[Event], joined: list[Event]) -> Finding:
    """A snapshot is no older than what others had seen when it was asked for."""
    known = max(map(_seq, _counts(before) or before), default=-1)
    faults = Faults()
    if joined and _seq(joined[0]) < known:
        faults.add("snapshot state", f"it begins with seq {_seq(joined[0])}, though {known} had been told")
    told = f"begins with seq {_seq(joined[0])}; {known} had been told" if joined else ""
    return faults.finding("snapshot state", told, looked=bool(joined))


def _complete(first: list[Event], joined: list[Event]) -> Finding:
    """After its snapshot, who came later gets the same events."""
    faults = Faults()
    start = _seq(joined[1 if _counts(joined[:1]) and len(joined) > 1 else 0]) if joined else 0
    rest = [event for event in first if _seq(event) >= start]
    for event in rest:
        if event not in joined:
            faults.add("nothing missed", f"seq {_seq(event)} did not come")
    return faults.finding("nothing missed", f"{len(rest)} events as for the first", looked=bool(joined and rest))


def _same_end(first: list[Event], other: list[Event]) -> Finding:
    faults = Faults()
    if first and (not other or other[-1] != first[-1]):
        faults.add("same end", "the last event is not the first subscriber's")
    return faults.finding("same end", "the last event is the first subscriber's", looked=bool(first))


def _late(first: list[Event], late: list[Event], took: float) -> Finding:
    """Who comes after the end gets the last counts, the terminal event, and the end of the stream."""
    faults = Faults()
    expected: list[Any] = [*_counts(first)[-1:], *first[-1:]]
    if late != expected:
        faults.add("story", f"{len(late)} events, not the last counts and the terminal event")
    if took > LATE_SECONDS:
        faults.add("story", f"it took {took:.1f} s")
    return faults.finding("story", f"the last counts and the terminal event, in {took:.2f} s", looked=bool(first))


def _left(first: list[Event]) -> Finding:
    """A subscriber that leaves cancels nothing."""
    end = first[-1].get("stage") if first else None
    faults = Faults()
    if end == "cancelled":
        faults.add("cancels nothing", "the load was cancelled after a subscriber had left")
    return faults.finding("cancels nothing", f"the load ended with {end}", looked=end == "ready")
