"""StopMatcher: finds stop strings in streamed text."""

from collections import deque
from collections.abc import Iterable, Sequence


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces.

    Text that may begin a stop string is held back until that is clear. The stop string that is complete first wins; of
    those that end at the same place the longest wins. So the result does not depend on how the text is cut into pieces.

    All stop strings are looked for at once, in time linear in the text, however many and long they are (Aho and
    Corasick, 1975). A state stands for the longest end of the text so far that begins a stop string.

    Attributes:
        matched: the stop string that was found; None before.
    """

    __slots__ = ("_automaton", "_held", "_state", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._automaton = _Automaton(stops) if stops else None
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that can be emitted: up to a match, or up to where one may begin."""
        automaton = self._automaton
        if automaton is None:
            return text
        state, held = self._state, len(self._held)
        text = self._held + text
        for end, char in enumerate(text[held:], held + 1):
            state = automaton.next(state, char)
            self.matched = automaton.found[state]
            if self.matched is not None:
                self._held, self._state = "", 0
                return text[: end - len(self.matched)]
        self._state = state
        keep = automaton.depth[state]
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was held back, when no more comes."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """The beginnings of some strings as states. 0 is the empty one.

    Attributes:
        depth: of each state, the length of its beginning.
        found: of each state, the longest string that its beginning ends with; None: there is none.
    """

    __slots__ = ("_fall", "_follow", "depth", "found")

    def __init__(self, strings: Iterable[str]) -> None:
        self._follow: list[dict[str, int]] = [{}]
        self._fall = [0]  # of each state, that of its longest end that is a beginning too
        self.depth = [0]
        self.found: list[str | None] = [None]
        for string in strings:
            self.found[self._add(string)] = string
        waiting = deque(self._follow[0].values())
        while waiting:
            state = waiting.popleft()
            for char, after in self._follow[state].items():
                self._fall[after] = fall = self.next(self._fall[state], char)
                if self.found[after] is None:
                    self.found[after] = self.found[fall]
                waiting.append(after)

    def next(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state and char not in self._follow[state]:
            state = self._fall[state]
        return self._follow[state].get(char, 0)

    def _add(self, string: str) -> int:
        state = 0
        for char in string:
            after = self._follow[state].get(char)
            if after is None:
                after = self._follow[state][char] = len(self.depth)
                self._follow.append({})
                self._fall.append(0)
                self.depth.append(self.depth[state] + 1)
                self.found.append(None)
            state = after
        return state
