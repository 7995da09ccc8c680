"""Readers: each reads one tool call while its text arrives."""

import json
import re
from collections.abc import Callable
from typing import Literal, Protocol

from rbee_worker.chat.json_scan import JsonScanner

Status = Literal["reading", "done", "failed"]

_SPACE = re.compile(r"[ \t\n\r]*")
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_KNOWN_KEYS = _ARGUMENT_KEYS | {"name", "type", "id"}


class CallReader(Protocol):
    """Reads one call.

    Attributes:
        status: ``done``: the call is complete. ``failed``: the text is not a call, or not any more.
        name: the function's name; None: not known yet.
        started: the name is known and the arguments have begun. From then on the text counts as a call.
    """

    status: Status
    name: str | None
    started: bool

    def push(self, text: str, at: int) -> int:
        """Read ``text[at:]``. Returns the position after what was read."""
        ...

    def take(self) -> str:
        """The JSON text of the arguments since the last call of this method. Call it only when ``started``."""
        ...


class ArgumentsReader:
    """Reads the arguments of a function whose name was read before: one JSON object (a :class:`CallReader`)."""

    def __init__(self, name: str) -> None:
        self.name: str | None = name
        self.started = False
        self.status: Status = "reading"
        self._scanner = JsonScanner()
        self._pieces: list[str] = []

    def push(self, text: str, at: int) -> int:
        if not self.started and not text.startswith("{", at):
            self.status = "failed"
            return at
        self.started = True
        end = self._scanner.push(text, at)
        self._pieces.append(text[at:end])
        if self._scanner.done or self._scanner.failed:
            self.status = "done" if self._scanner.done else "failed"
        return end

    def take(self) -> str:
        text = "".join(self._pieces)
        self._pieces.clear()
        return text


class ObjectReader:
    """Reads a call that is one JSON object, ``{"name": …, "arguments": {…}}`` (a :class:`CallReader`).

    The arguments may have the key ``parameters``, may come before the name, and may be a string that holds JSON text.
    If they are missing or null, they are ``{}``.

    Args:
        accept: whether a name may be that of a function.
        strict: whether to fail at a key that calls do not have. Used for text without a marker.
    """

    def __init__(self, accept: Callable[[str], bool], *, strict: bool = False) -> None:
        self.name: str | None = None
        self.started = False
        self.status: Status = "reading"
        self._accept = accept
        self._strict = strict
        self._state: Literal["open", "key_or_end", "key", "colon", "value", "inside", "next"] = "open"
        self._scanner = JsonScanner()
        self._collected: list[str] = []
        self._key: str | None = None
        self._arguments: list[str] = []
        self._has_arguments = False
        self._streams = False

    def push(self, text: str, at: int) -> int:
        while at < len(text) and self.status == "reading":
            at = self._read_inside(text, at) if self._state == "inside" else self._read_structure(text, at)
        return at

    def take(self) -> str:
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _read_structure(self, text: str, at: int) -> int:
        found = _SPACE.match(text, at)
        at = found.end() if found else at
        if at == len(text):
            return at
        char, state = text[at], self._state
        if state == "open" and char == "{":
            self._state = "key_or_end"
        elif state in ("key", "key_or_end") and char == '"':
            self._key = None
            self._begin_inside()
            return at
        elif state == "colon" and char == ":":
            self._state = "value"
        elif state == "value":
            self._begin_value(char)
            return at
        elif state == "next" and char == ",":
            self._state = "key"
        elif state in ("next", "key_or_end") and char == "}":
            self._end()
        else:
            self.status = "failed"
            return at
        return at + 1

    def _begin_inside(self) -> None:
        self._scanner = JsonScanner()
        self._collected = []
        self._state = "inside"

    def _begin_value(self, first: str) -> None:
        """Decide how to read the value, by its key and its first character."""
        if self._key == "name" and self.name is None:
            fits = first == '"'
        elif self._key in _ARGUMENT_KEYS and not self._has_arguments:
            fits = first in '{"n'
            self._streams = first == "{"
        else:
            fits = not self._strict or self._key in _KNOWN_KEYS
        if not fits:
            self.status = "failed"
            return
        self._begin_inside()
        if self._streams:
            self._has_arguments = True
            self._start()

    def _read_inside(self, text: str, at: int) -> int:
        end = self._scanner.push(text, at)
        (self._arguments if self._streams else self._collected).append(text[at:end])
        if self._scanner.failed:
            self.status = "failed"
        elif self._scanner.done:
            self._inside_ends()
        return end

    def _inside_ends(self) -> None:
        if self._key is None:
            self._key = self._decoded()
            self._state = "colon"
            self.status = "failed" if self._key is None else "reading"
            return
        if self._streams:
            self._streams = False
        elif self._key == "name" and self.name is None:
            self.name = self._decoded()
            if self.name is None or not self._accept(self.name):
                self.status = "failed"
        elif self._key in _ARGUMENT_KEYS and not self._has_arguments:
            self._take_other_arguments()
        self._state = "next"
        self._start()

    def _take_other_arguments(self) -> None:
        """Take arguments that are null, or a string that holds JSON text."""
        text = "".join(self._collected)
        inner = "{}" if text == "null" else self._decoded()
        if inner is None or not _is_object(inner):
            self.status = "failed"
            return
        self._arguments.append(inner)
        self._has_arguments = True

    def _decoded(self) -> str | None:
        """The collected JSON string, decoded; None: it is not a valid string."""
        try:
            value = json.loads("".join(self._collected), strict=False)
            # encode() raises for half a surrogate pair, which could not be sent.
            return value if isinstance(value, str) and value.encode() is not None else None
        except ValueError:
            return None

    def _start(self) -> None:
        if self.status == "reading":
            self.started = self.name is not None and self._has_arguments

    def _end(self) -> None:
        if self.name is None:
            self.status = "failed"
            return
        if not self._has_arguments:
            self._arguments.append("{}")
            self._has_arguments = True
        self._start()
        self.status = "done"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
