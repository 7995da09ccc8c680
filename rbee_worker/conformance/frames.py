"""Checks the bytes of one stream of Server-Sent Events, and the events in it. It sees bytes and times, no network."""

import json
from collections.abc import Mapping
from typing import Any

from rbee_worker.conformance.order import EventOrder, Faults, Finding
from rbee_worker.escape import one_line
from rbee_worker.wire import DONE, Line, Lines, Messages

SNAPSHOT_SECONDS = 5.0
"""A snapshot is at hand: it does not wait for the next event."""
HEADERS = {"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no"}

_MARK = b"\xef\xbb\xbf"


class FrameCheck:
    """Takes the bytes of one stream as they come.

    Args:
        gaps: whether events may be missing: the subscriber reads slowly.
        keep_alive: seconds of silence after which a comment is due; 0: times are not looked at.
        opened: when the stream was asked for, in seconds.

    Attributes:
        order: what the events say.
        done: whether ``[DONE]`` has come.
    """

    def __init__(self, *, gaps: bool = False, keep_alive: float = 0.0, opened: float = 0.0) -> None:
        self.order = EventOrder(gaps=gaps)
        self.done = False
        self._faults = Faults()
        self._keep_alive = keep_alive
        self._lines = Lines()
        self._messages = Messages()
        self._frame: list[Line] = []
        self._frames = 0
        self._comments = 0
        self._opened = self._at = opened
        self._first_at: float | None = None
        self._longest = 0.0
        self._bytes = 0

    def feed(self, data: bytes, at: float = 0.0) -> None:
        """Look at bytes that came at a time, in seconds.

        Raises:
            ValueError: a line or a message is longer than any event.
        """
        if self._bytes == 0 and data.startswith(_MARK):
            self._faults.add("frames", "the stream begins with a byte order mark")
        self._bytes += len(data)
        silence, self._at = at - self._at, at
        self._longest = max(self._longest, silence)
        if self._keep_alive and silence > 1.5 * self._keep_alive + 1:
            self._faults.add("keep-alive", f"nothing came for {silence:.1f} s")
        for line in self._lines.feed(data):
            if line.ending != b"\n":
                self._faults.add("frames", f"line {line.number} ends with {line.ending!r}")
            message = self._messages.take(line)
            if line.text:
                self._frame.append(line)
                continue
            self._shape(silence)
            if message is not None:
                self._take(message.data)

    def end(self, *, closed: bool = True, what: str = "the stream ended") -> list[Finding]:
        """What was found, once the stream has ended.

        Args:
            closed: whether it ended as it should.
            what: how it ended.
        """
        rest = [*self._lines.end(), *self._frame]
        if rest:
            self._faults.add("frames", "the stream ends inside a frame")
        if not self.done:
            self._faults.add("[DONE]", "none came")
        if not closed:
            self._faults.add("closed", what)
        found = [
            self._faults.finding("frames", f"{self._frames} of `data: ` and one line, LF only", looked=self._bytes > 0),
            *self.order.findings(),
            self._faults.finding("[DONE]", "the last frame"),
            self._faults.finding("closed", what),
        ]
        if self._keep_alive:
            found += [self._snapshot(), self._silence()]
        return found

    def _shape(self, silence: float) -> None:
        """The form of a frame, which an empty line has ended."""
        lines, self._frame = self._frame, []
        if not lines:
            self._faults.add("frames", "an empty line where no frame ends")
            return
        first = lines[0]
        if self.done:
            self._faults.add("[DONE]", "something came after it")
        if len(lines) > 1:
            self._faults.add("frames", f"the frame of line {first.number} has {len(lines)} lines")
        elif first.text.startswith(b":"):
            self._comments += 1
            if self._keep_alive and silence < self._keep_alive / 2:
                self._faults.add("keep-alive", f"a comment after {silence:.1f} s, which is no silence")
            if self._first_at is None:
                self._faults.add("snapshot", "a comment came first")
            return
        elif not first.text.startswith(b"data: "):
            self._faults.add("frames", f"line {first.number} is {one_line(repr(first.text[:40]))}")
        self._frames += 1
        if self._first_at is None:
            self._first_at = self._at

    def _take(self, data: bytes) -> None:
        if data == DONE.encode():
            self.done = True
            return
        event: Any = None
        try:
            event = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            self._faults.add("frames", f"no JSON: {one_line(str(error))}")
            return
        if isinstance(event, Mapping):
            self.order.take(event)
        else:
            self._faults.add("frames", "JSON that is no object")

    def _snapshot(self) -> Finding:
        took = None if self._first_at is None else self._first_at - self._opened
        if took is not None and took > SNAPSHOT_SECONDS:
            self._faults.add("snapshot", f"the first event took {took:.1f} s")
        seen = f"after {took:.2f} s" if took is not None else "no event came"
        return self._faults.finding("snapshot", seen, looked=took is not None)

    def _silence(self) -> Finding:
        seen = f"{self._comments} in silence" if self._comments else f"{self._longest:.1f} s was the longest silence"
        return self._faults.finding("keep-alive", seen, looked=self._comments > 0)


def check_headers(headers: Mapping[str, str]) -> Finding:
    """Whether a stream has its headers; their names in lower case."""
    faults = Faults()
    for name, value in HEADERS.items():
        told = headers.get(name, "")
        if (told.partition(";")[0].strip() if name == "content-type" else told) != value:
            faults.add("headers", f"{name} is {told!r}, not {value!r}" if told else f"{name} is missing")
    return faults.finding("headers", ", ".join(HEADERS.values()))


def check_body(body: bytes, *, gaps: bool = False) -> tuple[list[Mapping[str, Any]], list[Finding]]:
    """The events of a whole stream, and what was found in it."""
    check = FrameCheck(gaps=gaps)
    check.feed(body)
    findings = check.end()
    return check.order.events, findings
