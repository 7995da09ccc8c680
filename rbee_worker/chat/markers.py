"""Finds markers in text that arrives in pieces."""

import re
from collections.abc import Sequence


class MarkerFinder:
    """Finds the first of several markers, and text at the end that may become one."""

    __slots__ = ("_markers", "_pattern")

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(markers)
        self._pattern = re.compile("|".join(map(re.escape, self._markers)) or r"(?!)")

    def find(self, text: str, at: int = 0) -> tuple[int, int] | None:
        """The begin and end of the first marker in ``text[at:]``, as positions in ``text``; None: there is none."""
        found = self._pattern.search(text, at)
        return found.span() if found else None

    def starting(self, text: str, at: int) -> str | None:
        """The marker that begins at ``at``; None: there is none."""
        found = self._pattern.match(text, at)
        return found[0] if found else None

    def may_start(self, text: str, at: int) -> bool:
        """Whether ``text[at:]`` is the beginning of a marker, but not a whole one."""
        return any(len(text) - at < len(marker) and marker.startswith(text[at:]) for marker in self._markers)

    def held(self, text: str, at: int = 0) -> int:
        """The first position from which the rest of the text may begin a marker. The text's length: there is none."""
        longest = max(map(len, self._markers), default=1) - 1
        start = max(at, len(text) - longest)
        return next((index for index in range(start, len(text)) if self.may_start(text, index)), len(text))
