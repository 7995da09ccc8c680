import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.runtime.engine.stop import StopMatcher

texts = st.text(alphabet="abc", max_size=40)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def feed(stop: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stop)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.matched is not None:
            return out, matcher.matched
    return out + matcher.flush(), None


@given(texts, stops, st.lists(st.integers(0, 40), max_size=6))
def test_any_cut_gives_what_the_whole_text_gives(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    out, matched = feed(stop, pieces)
    assert (out, matched) == feed(stop, list(text))
    if matched is None:
        assert not any(candidate in text for candidate in stop)
        assert out == text
    else:
        assert out + matched == text[: len(out) + len(matched)]
        assert not any(candidate in out for candidate in stop)


def test_text_that_may_become_a_stop_is_held_and_let_go() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hi\n") == "Hi"
    assert matcher.push("\nUs") == ""
    assert matcher.push("ers") == "\n\nUsers"
    assert matcher.push("!\n\nUser: more") == "!"
    assert matcher.matched == "\n\nUser:"


def test_the_first_complete_counts_and_then_the_longest() -> None:
    assert feed(["abc", "ab"], ["xabcd"]) == ("x", "ab")
    assert feed(["c", "abc"], ["xabcd"]) == ("x", "abc")
    assert feed(["bcd", "c"], ["abcd"]) == ("ab", "c")


def test_without_stops_nothing_is_held() -> None:
    matcher = StopMatcher([])
    assert matcher.push("a") == "a"
    assert matcher.flush() == ""


@given(texts, stops)
def test_the_match_is_the_first_end_and_there_the_longest(text: str, stop: list[str]) -> None:
    ends = [
        (text.find(candidate) + len(candidate), -len(candidate), candidate) for candidate in stop if candidate in text
    ]
    out, matched = feed(stop, list(text))
    assert matched == (min(ends)[2] if ends else None)
    assert out == (text[: min(ends)[0] + min(ends)[1]] if ends else text)


def test_many_long_strings_take_no_longer_than_one() -> None:
    stop = ["a" * 1023 + "b", *(chr(ord("c") + n) * 1024 for n in range(15))]
    began = time.monotonic()
    out, matched = feed(stop, ["a"] * 3000 + ["c"])
    assert (out, matched) == ("a" * 3000 + "c", None)
    # It takes a hundredth of a second. Before, each piece took many milliseconds.
    assert time.monotonic() - began < 2
    assert feed(stop, ["a"] * 3000 + ["b"]) == ("a" * (3000 - 1023), stop[0])
