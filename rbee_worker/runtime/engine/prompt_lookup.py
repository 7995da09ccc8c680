"""Prompt lookup: guess the next tokens by what followed the same few tokens before.

Answers often repeat their prompt (code, summaries, extraction). A guess costs nothing to make; a step that checks
several tokens at once costs little more than one that makes one, since both read the same weights.
"""

from collections.abc import Sequence

_LONGEST = 3
_SHORTEST = 2


class PromptLookup:
    """Where each pair and triple of a growing list of tokens was last followed by something.

    Args:
        width: tokens to guess at most.
    """

    __slots__ = ("_followed", "_indexed", "_width")

    def __init__(self, width: int) -> None:
        self._width = width
        self._followed: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def guess(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """What may come behind ``tokens``, of which earlier calls have seen the beginning."""
        for end in range(max(self._indexed, _SHORTEST), len(tokens)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._followed[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            found = self._followed.get(tuple(tokens[-size:]))
            if found is not None:
                return tuple(tokens[found : found + self._width])
        return ()
