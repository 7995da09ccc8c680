"""Makes text from a file, a library or a client safe to show: it stays on its line and cannot control a terminal."""

import itertools
import json

_LONGEST_VALUE = 120
_LONGEST_LINE = 300
_INSIDE = 40
"""Items of a list in a list that are looked at: with their commas they fill a value."""


def quoted(text: object) -> str:
    """Untrusted text for a message: in quotes, control characters escaped, cut at 120 characters."""
    # It may be megabytes, so only its beginning goes through repr().
    shown = repr(_beginning(text, _LONGEST_VALUE + 1, 3))
    return shown if len(shown) <= _LONGEST_VALUE else shown[: _LONGEST_VALUE - 3] + "..."


def _beginning(value: object, items: int, levels: int) -> object:
    if isinstance(value, str | bytes):
        return value[: _LONGEST_VALUE + 1]
    if isinstance(value, list | tuple | dict) and value and not levels:
        return ...
    if isinstance(value, list | tuple):
        return type(value)([_beginning(item, _INSIDE, levels - 1) for item in value[:items]])
    if isinstance(value, dict):
        head = itertools.islice(value.items(), items)
        return {_beginning(key, 0, 0): _beginning(item, _INSIDE, levels - 1) for key, item in head}
    return value


def printable(text: str) -> str:
    """The text with everything escaped that is not printable: control characters, ends of lines, marks of direction."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """As :func:`printable`, but the ends of its lines stay. For tracebacks."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    """JSON with the same content, in which everything is escaped that is not printable."""
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Untrusted text for a message: on one line, control characters escaped, cut at 300 characters."""
    # Of what may be megabytes only the beginning is looked at.
    line = printable(" ".join(text[: 2 * _LONGEST_LINE].split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}…"


def reason(error: BaseException) -> str:
    """What an exception says, as :func:`one_line`; its type where it says nothing."""
    return one_line(str(error)) or type(error).__name__
