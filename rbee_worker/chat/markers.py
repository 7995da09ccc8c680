"""Finding markers in text that arrives in pieces."""

import re
from collections.abc import Sequence


class MarkerFinder:
    """Finds the first of several markers, and the end of a text that may yet become one."""

    __slots__ = ("_markers", "_pattern")

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(markers)
        self._pattern = re.compile("|".join(map(re.escape, self._markers)) or r"(?!)")

    def find(self, text: str, at: int = 0) -> tuple[int, int] | None:
        """Where the first marker at or behind ``at`` begins and ends."""
        found = self._pattern.search(text, at)
        return found.span() if found else None

    def starting(self, text: str, at: int) -> str | None:
        """The marker that stands at ``at``."""
        found = self._pattern.match(text, at)
        return found[0] if found else None

    def may_start(self, text: str, at: int) -> bool:
        """Whether all of ``text[at:]`` begins a marker, short of a whole one."""
        return any(len(text) - at < len(marker) and marker.startswith(text[at:]) for marker in self._markers)

    def held(self, text: str, at: int = 0) -> int:
        """Position from which the text's end may be the beginning of a marker; the text's length: nowhere."""
        longest = max(map(len, self._markers), default=1) - 1
        start = max(at, len(text) - longest)
        return next((index for index in range(start, len(text)) if self.may_start(text, index)), len(text))
