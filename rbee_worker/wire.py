"""Streams of events, taken apart as their bytes come: lines, SSE messages, events; whatever was sent, no traceback.

A stream is NDJSON, as ``--json`` writes it, or SSE, as HTTP sends it. Nobody has to say which: a line of NDJSON begins
with ``{``, which no field of SSE does.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from rbee_worker.errors import error_of
from rbee_worker.escape import one_line
from rbee_worker.events import (
    End,
    Event,
    InferenceFailed,
    LoadingEvent,
    Ready,
    UnknownEvent,
    from_dict,
)

DONE = "[DONE]"
"""The data of the frame after the last event of a stream of SSE."""

MAX_BYTES = 2**25
"""Of one event. The log-probabilities of a long prompt are some MiB."""
MAX_SHOWN = 2**16
"""Characters of an event that is drawn as a whole."""
LARGEST = 2**63
"""No figure of a load or of a job comes near it."""

_ENDING = re.compile(rb"\r\n|\n|\r")
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its ending; its number counts from 1."""

    text: bytes
    ending: bytes
    number: int


class Lines:
    """Splits bytes into lines, which end as the standard of SSE says: with LF, CR LF or CR.

    A line is given as soon as its ending begins: after CR nobody waits for LF. A byte order mark at the beginning of
    the stream is left out.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # of the line that has not ended
        self._length = 0
        self._number = 0
        self._after_cr = False

    def feed(self, data: bytes) -> Iterator[Line]:
        """The lines that end in these bytes.

        Raises:
            ValueError: a line is longer than :data:`MAX_BYTES`.
        """
        start = 1 if self._after_cr and data.startswith(b"\n") else 0
        self._after_cr = data.endswith(b"\r") or (self._after_cr and not data)
        for ending in _ENDING.finditer(data, start):
            self._keep(data[start : ending.start()])
            start = ending.end()
            yield self._line(ending[0])
        self._keep(data[start:])

    def end(self) -> Iterator[Line]:
        """The rest of the stream, where it does not end with an ending of a line."""
        if self._length:
            yield self._line(b"")

    def _keep(self, part: bytes) -> None:
        self._length += len(part)
        if self._length > MAX_BYTES:
            raise ValueError(f"line {self._number + 1} has more than {MAX_BYTES:,} bytes")
        if part:
            self._parts.append(part)

    def _line(self, ending: bytes) -> Line:
        self._number += 1
        text = b"".join(self._parts)
        self._parts.clear()
        self._length = 0
        return Line(text.removeprefix(_MARK) if self._number == 1 else text, ending, self._number)


@dataclass(frozen=True, slots=True)
class Message:
    """The data of an SSE message, and the number of the line with which it began."""

    data: bytes
    line: int


class Messages:
    """Puts lines of SSE together to messages. Comments, and fields other than ``data``, are left out.

    A message ends with an empty line. One that the end of the stream cuts is none, as the standard says.
    """

    def __init__(self) -> None:
        self._data: list[bytes] = []
        self._length = 0
        self._begun = 0

    def take(self, line: Line) -> Message | None:
        """The message that ends with this line, if one does.

        Raises:
            ValueError: the message is longer than :data:`MAX_BYTES`.
        """
        if not line.text:
            data, begun = self._data, self._begun
            self._data, self._length = [], 0
            return Message(b"\n".join(data), begun) if any(data) else None
        name, _, value = line.text.partition(b":")
        if name == b"data":
            if not self._data:
                self._begun = line.number
            self._data.append(value.removeprefix(b" "))
            self._length += len(value)
            if self._length > MAX_BYTES:
                raise ValueError(f"the message of line {self._begun} has more than {MAX_BYTES:,} bytes")
        return None


class EventReader:
    """Gives the events of a stream of NDJSON or SSE. Events and fields that nobody here knows are left out.

    Attributes:
        done: whether ``[DONE]`` came after the newest event.
        unknown: how many objects were no event of this version.
    """

    def __init__(self) -> None:
        self.done = False
        self.unknown = 0
        self._lines = Lines()
        self._messages = Messages()

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that end in these bytes.

        Raises:
            ValueError: something that should be an event is none; the message names its line.
            RbeeError: instead of a stream came the answer of a worker that refuses; this is its error.
        """
        for line in self._lines.feed(data):
            yield from self._events(line)

    def end(self) -> Iterator[Event]:
        """The event of a last line of NDJSON that has no ending. Raises as :meth:`feed`."""
        for line in self._lines.end():
            if line.text.startswith(b"{"):
                yield from self._events(line)

    def _events(self, line: Line) -> Iterator[Event]:
        message = Message(line.text, line.number) if line.text.startswith(b"{") else self._messages.take(line)
        if message is None:
            return
        text = message.data.decode(errors="replace")
        if text == DONE:
            self.done = True
            return
        try:
            data = _object(text)
            if (refused := refusal_in(data)) is not None:
                code, told, hint = refused
                raise error_of(code, told[:MAX_SHOWN], hint=hint)
            event = _event(data, len(text))
        except UnknownEvent:
            self.unknown += 1
            return
        except ValueError as error:
            raise ValueError(f"line {message.line}: {error}") from None
        self.done = False
        yield event


def event_in(text: str) -> Event:
    """The event in a text of JSON, its figures in bounds that can be drawn.

    Raises:
        UnknownEvent: it is an object, but no event of this version.
        ValueError: it is no event.
    """
    return _event(_object(text), len(text))


def _object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON: {one_line(str(error))}") from None
    if not isinstance(data, dict):
        raise ValueError("no JSON object")  # noqa: TRY004 - a wrong value, as all others here
    return data


def _event(data: Mapping[str, Any], length: int) -> Event:
    try:
        event = from_dict(data)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    kind = type(event).__name__
    if isinstance(event, LoadingEvent | InferenceFailed) and length > MAX_SHOWN:
        raise ValueError(f"{kind} event of {length:,} characters")
    for name, value in _figures(event):
        if not abs(value) < LARGEST:
            raise ValueError(f"malformed {kind} event: {name} is out of range")
        if value < 0 and not isinstance(event, Ready):
            raise ValueError(f"malformed {kind} event: {name} is negative: {value}")
    return event


def refusal_in(data: Mapping[str, Any]) -> tuple[str, str, str | None] | None:
    """The code, message and hint of an error envelope; None: the object is none."""
    error = data.get("error")
    if not isinstance(error, Mapping) or not isinstance(error.get("message"), str):
        return None
    hint = error.get("hint")
    return str(error.get("code") or ""), error["message"], hint if isinstance(hint, str) else None


def _figures(event: Event) -> Iterator[tuple[str, int | float]]:
    """What is counted and drawn: name -> number."""
    if not isinstance(event, LoadingEvent | End):
        return
    values = [(field.name, getattr(event, field.name)) for field in fields(event)]
    if isinstance(event, Ready):
        values += [(field.name, getattr(event.report, field.name)) for field in fields(event.report)]
    for name, value in values:
        numbers = value.values() if isinstance(value, Mapping) else (value,)
        yield from ((name, number) for number in numbers if isinstance(number, int | float))
