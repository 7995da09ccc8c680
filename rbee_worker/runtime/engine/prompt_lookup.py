"""Prompt lookup: draft the next tokens from what followed the same few tokens before.

Answers often repeat their prompt (code, summaries, extraction). A draft costs nothing to make. A step that checks
several tokens costs little more than a step that makes one, since both read the same weights.
"""

from collections.abc import Sequence

_LONGEST = 3
_SHORTEST = 2


class PromptLookup:
    """An index of a growing list of tokens: after which pairs and triples something came, and where.

    Args:
        width: how many tokens to draft at most.
    """

    __slots__ = ("_followed", "_indexed", "_width")

    def __init__(self, width: int) -> None:
        self._width = width
        self._followed: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def draft(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """A draft of what follows ``tokens``. The list only grows from call to call."""
        for end in range(max(self._indexed, _SHORTEST), len(tokens)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._followed[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            found = self._followed.get(tuple(tokens[-size:]))
            if found is not None:
                return tuple(tokens[found : found + self._width])
        return ()
