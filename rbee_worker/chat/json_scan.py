"""Follows JSON that arrives in pieces: where the value ends, and whether it can still become valid."""

import re
from typing import Literal

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\]*')
_SCALAR_TEXT = re.compile(r'[^\s,:"\[\]{}]*')
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")

_State = Literal["value", "value_or_end", "key", "key_or_end", "colon", "next", "string", "escape", "scalar"]


class JsonScanner:
    """Follows one JSON value (RFC 8259) in text that arrives in pieces, in time linear in its length.

    It checks the structure, numbers and literals. Strings are not checked: it accepts raw line breaks in them, because
    models write them and most readers accept them.

    Attributes:
        done: the value is complete.
        failed: the text cannot become JSON any more.
    """

    __slots__ = ("_is_key", "_scalar", "_stack", "_state", "done", "failed")

    def __init__(self) -> None:
        self._state: _State = "value"
        self._stack: list[str] = []
        self._scalar: list[str] = []
        self._is_key = False
        self.done = False
        self.failed = False

    def push(self, text: str, at: int = 0) -> int:
        """Read ``text[at:]``.

        Returns:
            The position after the last character of the value. If it failed: the position of the first wrong character,
            or of the end of a wrong number or literal.
        """
        size = len(text)
        while at < size and not (self.done or self.failed):
            match self._state:
                case "string" | "escape":
                    at = self._read_string(text, at)
                case "scalar":
                    at = self._read_scalar(text, at)
                case _:
                    at = self._read_structure(text, at)
        return at

    def _read_string(self, text: str, at: int) -> int:
        if self._state == "escape":
            self._state = "string"
            return at + 1
        found = _PLAIN.match(text, at)
        at = found.end() if found else at
        if at == len(text):
            return at
        if text[at] == "\\":
            self._state = "escape"
        elif self._is_key:
            self._is_key = False
            self._state = "colon"
        else:
            self._value_ends()
        return at + 1

    def _read_scalar(self, text: str, at: int) -> int:
        found = _SCALAR_TEXT.match(text, at)
        end = found.end() if found else at
        self._scalar.append(text[at:end])
        if end < len(text):
            if _SCALAR.fullmatch("".join(self._scalar)):
                self._value_ends()
            else:
                self.failed = True
            self._scalar.clear()
        return end

    def _read_structure(self, text: str, at: int) -> int:
        found = _SPACE.match(text, at)
        at = found.end() if found else at
        if at == len(text):
            return at
        char, state = text[at], self._state
        if state == "colon" and char == ":":
            self._state = "value"
        elif state == "next" and char == ",":
            self._state = "key" if self._stack[-1] == "}" else "value"
        elif state in ("next", "value_or_end", "key_or_end") and char == self._stack[-1]:
            self._stack.pop()
            self._value_ends()
        elif state in ("key", "key_or_end") and char == '"':
            self._is_key = True
            self._state = "string"
        elif state in ("value", "value_or_end"):
            return self._begin_value(char, at)
        else:
            self.failed = True
            return at
        return at + 1

    def _begin_value(self, char: str, at: int) -> int:
        match char:
            case "{":
                self._stack.append("}")
                self._state = "key_or_end"
            case "[":
                self._stack.append("]")
                self._state = "value_or_end"
            case '"':
                self._state = "string"
            case _ if char.isalnum() or char == "-":
                self._state = "scalar"
                return at
            case _:
                self.failed = True
                return at
        return at + 1

    def _value_ends(self) -> None:
        self._state = "next"
        self.done = not self._stack
