"""Reads calls that are written as Python, ``f(x=1, y=["a", None])``, and turns their arguments into JSON."""

import json
import math
import re
from collections.abc import Callable
from typing import Literal

_NAME = re.compile(r"\s*([A-Za-z_][\w.\-]*)\s*", re.ASCII)
_NAME_SO_FAR = re.compile(r"\s*(?:[A-Za-z_][\w.\-]*\s*)?", re.ASCII)
_LONGEST_NAME = 256
_NOTABLE = re.compile(r"""["'()\[\]{}\\]""")
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')"""
    r"|(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<word>[A-Za-z_]\w*)|(?P<mark>[()\[\]{},:=]))\s*",
    re.ASCII | re.DOTALL,
)
_CONSTANTS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": "", "a": "\a", "v": "\v", "0": "\0"}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class PythonicReader:
    """Reads one call in Python's syntax with keyword arguments (a :class:`~rbee_worker.chat.readers.CallReader`).

    It gives the arguments when the call is complete. Before that it is not known whether they can be written as JSON.
    """

    def __init__(self, accept: Callable[[str], bool]) -> None:
        self.name: str | None = None
        self.started = False
        self.status: Literal["reading", "done", "failed"] = "reading"
        self._accept = accept
        self._head = ""
        self._body: list[str] = []
        self._arguments = ""
        self._open: list[str] = []
        self._quote = ""
        self._escaped = False

    def push(self, text: str, at: int) -> int:
        if not self._open:
            at = self._read_head(text, at)
        if self._open and self.status == "reading":
            at = self._read_body(text, at)
        return at

    def take(self) -> str:
        text, self._arguments = self._arguments, ""
        return text

    def _read_head(self, text: str, at: int) -> int:
        """Read the name, up to the opening bracket."""
        while at < len(text):
            char = text[at]
            if char == "(":
                found = _NAME.fullmatch(self._head)
                self.name = found[1] if found else None
                if self.name is None or not self._accept(self.name):
                    self.status = "failed"
                    return at
                self._open.append(")")
                return at + 1
            if len(self._head) >= _LONGEST_NAME or not _NAME_SO_FAR.fullmatch(self._head + char):
                self.status = "failed"
                return at
            self._head += char
            at += 1
        return at

    def _read_body(self, text: str, start: int) -> int:
        at = start
        while self._open and self.status == "reading":
            if self._escaped:
                if at >= len(text):
                    break
                self._escaped = False
                at += 1
            found = _NOTABLE.search(text, at)
            if found is None:
                at = len(text)
                break
            at = found.end()
            self._note(found[0])
        self._body.append(text[start:at])
        if not self._open:
            self._end()
        return at

    def _note(self, char: str) -> None:
        if self._quote:
            if char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char in _CLOSING:
            self._open.append(_CLOSING[char])
        elif char == self._open[-1]:
            self._open.pop()
        else:
            self.status = "failed"

    def _end(self) -> None:
        try:
            self._arguments = keywords_as_json("".join(self._body)[:-1])
        except ValueError:
            self.status = "failed"
            return
        self.started = True
        self.status = "done"


def keywords_as_json(text: str) -> str:
    """Turn the keyword arguments of a Python call, such as ``x=1, y='a'``, into the text of a JSON object.

    Raises:
        ValueError: a value is not a literal (number, string, boolean, None, list, tuple or dict), or has no JSON form.
    """
    writer = _JsonWriter()
    for kind, piece in _tokens(text):
        writer.write(kind, piece)
    return writer.end()


class _JsonWriter:
    """Writes keyword arguments and their literals as JSON, token by token."""

    def __init__(self) -> None:
        self._out = ["{"]
        self._open = ["="]
        """Brackets that are not closed yet. ``=`` stands for the arguments themselves."""
        self._state: Literal["key", "colon", "value", "next"] = "key"
        self._may_end = True

    def write(self, kind: str, piece: str) -> None:
        inside = self._open[-1]
        if kind == "mark" and self._may_end and piece == _CLOSING.get(inside):
            self._close()
        elif kind == "mark" and self._state == "next" and piece == ",":
            self._out.append(", ")
            self._expect("key" if inside in "={" else "value", may_end=True)
        elif kind == "mark" and self._state == "value" and piece in _CLOSING:
            self._out.append("{" if piece == "{" else "[")
            self._open.append(piece)
            self._expect("key" if piece == "{" else "value", may_end=True)
        elif self._state == "key" and kind == ("word" if inside == "=" else "string"):
            self._out.append(json.dumps(piece) if inside == "=" else _string(piece))
            self._expect("colon", may_end=False)
        elif self._state == "colon" and piece == ("=" if inside == "=" else ":"):
            self._out.append(": ")
            self._expect("value", may_end=False)
        elif self._state == "value" and kind != "mark":
            self._out.append(_scalar(kind, piece))
            self._expect("next", may_end=True)
        else:
            raise ValueError("not a literal")

    def end(self) -> str:
        """The JSON text."""
        if len(self._open) > 1 or not self._may_end:
            raise ValueError("the arguments end early")
        self._close()
        return "".join(self._out)

    def _close(self) -> None:
        if self._out[-1] == ", ":
            self._out.pop()
        self._out.append("}" if self._open.pop() in "={" else "]")
        self._expect("next", may_end=True)

    def _expect(self, state: Literal["key", "colon", "value", "next"], *, may_end: bool) -> None:
        self._state, self._may_end = state, may_end


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, at = [], 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or found.lastgroup is None:
            if text[at:].strip():
                raise ValueError("not a literal")
            break
        tokens.append((found.lastgroup, found[found.lastgroup]))
        at = found.end()
    return tokens


def _scalar(kind: str, piece: str) -> str:
    if kind == "string":
        return _string(piece)
    if kind == "number":
        return _number(piece)
    if piece not in _CONSTANTS:
        raise ValueError("a name is not a literal")
    return _CONSTANTS[piece]


def _number(piece: str) -> str:
    digits = piece.removeprefix("+")
    if _INTEGER.fullmatch(digits):
        return digits
    if digits.lstrip("-").isdigit() or math.isinf(number := float(digits)):
        raise ValueError("no number of JSON's")
    return json.dumps(number)


def _string(piece: str) -> str:
    text = _ESCAPE.sub(_unescaped, piece[1:-1])
    # A pair of surrogates becomes its character. Half a pair is refused.
    return json.dumps(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le"), ensure_ascii=False)


def _unescaped(found: re.Match[str]) -> str:
    code = found[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return _ESCAPES.get(code, code if code in "\"'\\" else "\\" + code)
