"""Finds tool calls in an answer that arrives in pieces."""

import re
import secrets
import string
from collections.abc import Callable, Collection
from functools import partial

from rbee_worker.chat.deltas import Delta, DeltaList
from rbee_worker.chat.markers import MarkerFinder
from rbee_worker.chat.pythonic import PythonicReader
from rbee_worker.chat.readers import ArgumentsReader, CallReader, ObjectReader
from rbee_worker.chat.styles import ToolStyle

_NAME_FIRST = frozenset(string.ascii_letters + string.digits + "_")
_SPACE = re.compile(r"\s*")
_HEAD = re.compile(r"([A-Za-z0-9_.\-]+)\s*(?:\[CALL_ID\]\s*[A-Za-z0-9_\-]*\s*)?(?:\[ARGS\]\s*)?")
_LONGEST_HEAD = 256
_MISTRAL_ID_LENGTH = 9


def new_call_id() -> str:
    """A new id in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def new_mistral_call_id() -> str:
    """A new id in the form that Mistral's templates need: nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_MISTRAL_ID_LENGTH))


class ToolCallParser:
    """Separates tool calls from content.

    It is a state machine over characters: the result does not depend on how the text is cut into pieces, and the time
    is linear in the text's length. Text that may be a call is held until this is decided; if it is not a call, it
    becomes content. A call counts when its name is known and its arguments have begun. If a call breaks after that, the
    rest of the text is content.

    Args:
        style: how calls are written.
        tool_names: the functions that may be called. A call without a marker must have one of these names. Empty: any
            name is accepted.

    Attributes:
        count: how many calls have begun.
    """

    def __init__(self, style: ToolStyle, tool_names: Collection[str] = ()) -> None:
        self.count = 0
        self._style = style
        self._names = frozenset(tool_names)
        self._new_id = new_mistral_call_id if style.named else new_call_id
        self._opens = MarkerFinder(style.opens)
        self._closes = MarkerFinder(style.closes)
        self._out = DeltaList()
        self._text = ""
        self._at = 0
        self._state: Callable[[], bool] = self._at_start if style.bare else self._in_content
        self._marked = False
        self._in_array = False
        self._announced = False
        self._pending: list[str] = []
        """Held text. It is content, unless a call follows."""
        self._separated = False
        self._spoke = False

    def push(self, text: str) -> list[Delta]:
        """The deltas that ``text`` adds."""
        self._text, self._at = self._text[self._at :] + text, 0
        while self._state():
            pass
        return self._out.take()

    def finish(self) -> list[Delta]:
        """The deltas of the text that was held. Call it when the answer has ended."""
        held, self._text, self._at = "".join(self._pending), self._text[self._at :], 0
        if self._state == self._behind_call and self._closes.may_start(self._text, 0):
            held = self._text = ""
        if self._state in (self._behind_call, self._at_call) and self.count and not self._text:
            # White space, and a comma or semicolon that no call followed.
            held = held.strip(" \t\r\n,;")
        self._out.content(held + self._text)
        self._pending.clear()
        self._text = ""
        return self._out.take()

    # Each state reads from self._at on. It returns whether there may be more to read.

    def _at_start(self) -> bool:
        if not self._skip_space():
            return False
        self._state = self._at_call if self._text[self._at] in "{[" else self._in_content
        return True

    def _in_content(self) -> bool:
        found = self._opens.find(self._text, self._at)
        end = found[0] if found else self._opens.held(self._text, self._at)
        self._say(self._text[self._at : end])
        self._at = end
        if found:
            self._open_marker(found[1])
        return found is not None

    def _open_marker(self, end: int) -> None:
        self._consume(end)
        self._marked, self._in_array = True, False
        self._state = self._at_call

    def _at_call(self) -> bool:
        """A call, or an array of calls, may begin here."""
        if not self._skip_space():
            return False
        char = self._text[self._at]
        if char == "[" and not self._in_array:
            self._in_array = True
            self._consume(self._at + 1)
        elif char == "{":
            self._read_with(ObjectReader(self._accept, strict=not self._marked))
        elif char in _NAME_FIRST and self._style.named and not self._in_array:
            self._state = self._at_name
        elif char in _NAME_FIRST and self._style.bare and self._in_array:
            self._read_with(PythonicReader(self._accept))
        else:
            self._give_up()
        return True

    def _at_name(self) -> bool:
        """``name[ARGS]{…}`` may begin here."""
        end = self._text.find("{", self._at)
        size = (end if end >= 0 else len(self._text)) - self._at
        found = _HEAD.fullmatch(self._text, self._at, end) if end >= 0 else None
        if size > _LONGEST_HEAD or (end >= 0 and (found is None or not self._accept(found[1]))):
            self._give_up()
        elif found is None:
            return False
        else:
            self._consume(end)
            self._read_with(ArgumentsReader(found[1]))
        return True

    def _read_with(self, reader: CallReader) -> None:
        self._announced = False
        self._state = partial(self._in_call, reader)

    def _in_call(self, reader: CallReader) -> bool:
        end = reader.push(self._text, self._at)
        moved = end > self._at
        if self._announced:
            self._at = end
        else:
            self._consume(end)
        if reader.started and not self._announced:
            self._announce(reader.name or "")
        if self._announced:
            self._out.arguments(self.count - 1, reader.take())
        if reader.status == "done":
            self._separated = False
            self._state = self._behind_call
        elif reader.status == "failed":
            self._give_up()
        else:
            return moved and self._at < len(self._text)
        return True

    def _announce(self, name: str) -> None:
        self._announced = True
        self._pending.clear()
        self._out.call(self.count, self._new_id(), name)
        self.count += 1

    def _behind_call(self) -> bool:
        """After a call: white space, separators and closing markers, then another call or content."""
        if not self._skip_space():
            return False
        if self._closes.may_start(self._text, self._at) or self._opens.may_start(self._text, self._at):
            return False
        if (marker := self._closes.starting(self._text, self._at)) is not None:
            self._pending.clear()
            self._at += len(marker)
        elif (marker := self._opens.starting(self._text, self._at)) is not None:
            self._pending.clear()
            self._open_marker(self._at + len(marker))
        elif not self._step_separator():
            if not self._spoke and not self._separated:
                self._pending.clear()
            self._in_array = False
            self._state = self._in_content
        return True

    def _step_separator(self) -> bool:
        """Read what may stand between calls and is not a marker: ``,`` and ``]`` of an array, or ``;``."""
        char = self._text[self._at]
        if self._in_array and char in ",]":
            self._in_array = char == ","
            if self._in_array:
                self._consume(self._at + 1)
                self._state = self._at_call
            else:
                self._pending.clear()
                self._at += 1
        elif char == self._style.separator and not self._separated and not self._in_array:
            self._separated = True
            self._consume(self._at + 1)
        elif char == "{" and self._style.bare and not self._in_array:
            self._state = self._at_call
        else:
            return False
        return True

    def _accept(self, name: str) -> bool:
        return bool(name) and (self._marked or not self._names or name in self._names)

    def _skip_space(self) -> bool:
        """Hold white space. Returns whether any text follows it."""
        found = _SPACE.match(self._text, self._at)
        self._consume(found.end() if found else self._at)
        return self._at < len(self._text)

    def _consume(self, end: int) -> None:
        """Hold the text up to ``end``."""
        if end > self._at:
            self._pending.append(self._text[self._at : end])
            self._at = end

    def _say(self, text: str) -> None:
        """Emit content. White space at its end is held, because before a call it is dropped."""
        solid = text.rstrip()
        if solid:
            self._out.content("".join(self._pending) + solid)
            self._pending.clear()
            self._spoke = True
        if len(solid) < len(text):
            self._pending.append(text[len(solid) :])

    def _give_up(self) -> None:
        """This is not a call, or not any more: all held text is content."""
        held = "".join(self._pending)
        self._pending.clear()
        self._say(held)
        self._in_array = False
        self._state = self._in_content
