"""Each rule of the bytes is told from the stream that breaks it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.conformance.frames import FrameCheck, check_body, check_headers
from rbee_worker.conformance.order import failures
from tests.unit.samples import JOB, LOAD
from tests.unit.test_wire import cut, sse

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
GOOD = sse(*LOAD) + DONE


@pytest.mark.parametrize("body", [GOOD, sse(*JOB) + DONE, KEEP_ALIVE + GOOD.replace(DONE, KEEP_ALIVE + DONE)])
def test_good_streams_have_no_faults(body: bytes):
    events, findings = check_body(body)
    assert failures(findings) == []
    assert len(events) in {len(LOAD), len(JOB)}


BROKEN = {
    "CR LF": (GOOD.replace(b"\n", b"\r\n"), "frames: line 1 ends with b'\\r\\n'"),
    "one CR": (GOOD[:-2] + b"\r\n", "frames: line 69 ends with b'\\r\\n'"),
    "mark": (b"\xef\xbb\xbf" + GOOD, "frames: the stream begins with a byte order mark"),
    "no space": (GOOD.replace(b"data: {", b"data:{", 1), "frames: line 1 is"),
    "event line": (b"event: x\n" + GOOD, "frames: the frame of line 1 has 2 lines"),
    "id alone": (b"id: 1\n\n" + GOOD, "frames: line 1 is"),
    "two lines of data": (b"data: {\ndata: }\n\n" + GOOD, "frames: the frame of line 1 has 2 lines"),
    "empty frame": (b"\n" + GOOD, "frames: an empty line where no frame ends"),
    "cut": (GOOD[:-1], "frames: the stream ends inside a frame"),
    "no JSON": (b"data: {\n\n" + GOOD, "frames: no JSON"),
    "deep": (b"data: " + b"[" * 100_000 + b"\n\n" + GOOD, "frames: no JSON"),
    "list": (b"data: []\n\n" + GOOD, "frames: JSON that is no object"),
    "no done": (GOOD.removesuffix(DONE), "[DONE]: none came"),
    "two": (GOOD + DONE, "[DONE]: something came after it"),
    "comment after it": (GOOD + KEEP_ALIVE, "[DONE]: something came after it"),
    "nothing": (b"", "[DONE]: none came"),
}


@pytest.mark.parametrize(("body", "fault"), BROKEN.values(), ids=BROKEN)
def test_each_broken_rule_is_told(body: bytes, fault: str):
    found = failures(check_body(body)[1])
    assert any(text.startswith(fault) for text in found), found


@given(st.binary(max_size=100), st.lists(st.integers(0, 3000), max_size=5))
def test_it_finds_the_same_however_the_bytes_are_cut(data: bytes, places: list[int]):
    body = GOOD[:300] + data + GOOD[300:]
    check = FrameCheck()
    for part in cut(body, places):
        check.feed(part)
    assert (check.order.events, check.end()) == check_body(body)


def timed(*parts: tuple[float, bytes], keep_alive: float = 10.0) -> list[str]:
    check = FrameCheck(keep_alive=keep_alive, opened=100.0)
    for at, data in parts:
        check.feed(data, 100.0 + at)
    return failures(check.end())


def test_times():
    first, rest = sse(*LOAD[:9]), sse(*LOAD[9:]) + DONE
    assert timed((0.1, first), (10.1, KEEP_ALIVE), (20.2, KEEP_ALIVE), (20.3, rest)) == []
    assert timed((0.1, first), (17.0, rest)) == ["keep-alive: nothing came for 16.9 s"]
    assert timed((0.1, first), (17.0, rest), keep_alive=0) == []
    assert timed((0.1, first), (1.0, KEEP_ALIVE), (1.1, rest)) == [
        "keep-alive: a comment after 0.9 s, which is no silence"
    ]
    assert timed((6.0, first + rest)) == ["snapshot: the first event took 6.0 s"]
    assert timed((9.9, KEEP_ALIVE), (10.0, first + rest)) == [
        "snapshot: a comment came first; the first event took 10.0 s"
    ]


def test_silence_that_never_came_is_not_called_good():
    check = FrameCheck(keep_alive=10.0)
    check.feed(GOOD)
    assert [(found.check, found.ok) for found in check.end() if found.ok is not True] == [("keep-alive", None)]


def test_a_stream_that_stays_open():
    check = FrameCheck()
    check.feed(GOOD)
    assert failures(check.end(closed=False, what="it stays open")) == ["closed: it stays open"]


def test_headers():
    good = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}
    assert check_headers(good).ok
    assert check_headers(good | {"cache-control": "no-cache"}).detail == "cache-control is 'no-cache', not 'no-store'"
    assert "x-accel-buffering is missing" in check_headers({}).detail
