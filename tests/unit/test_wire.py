"""Streams of events taken apart: the standard's lines and messages, however the bytes are cut; hostile ones."""

import json
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from rbee_worker import wire
from rbee_worker.errors import Unavailable
from rbee_worker.events import Event, LoadFailed, Resolving, Token, UnknownEvent, to_dict, to_json
from rbee_worker.wire import EventReader, Lines, Messages, event_in
from tests.unit.samples import JOB, LOAD, READY, layers


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(bounds)]


def lines_of(*parts: bytes) -> list[bytes]:
    lines = Lines()
    return [line.text for part in parts for line in lines.feed(part)] + [line.text for line in lines.end()]


def messages_of(data: bytes) -> list[bytes]:
    lines, messages = Lines(), Messages()
    found = [messages.take(line) for line in lines.feed(data)]
    return [message.data for message in found if message is not None]


def read(*parts: bytes) -> tuple[list[Event], EventReader]:
    reader = EventReader()
    return [event for part in parts for event in reader.feed(part)] + list(reader.end()), reader


@example(b"a\r\n\rb\n\n\r\nc", [2, 3])
@given(
    st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\xef\xbb\xbf", b"\xff"])).map(b"".join),
    st.lists(st.integers(0, 20)),
)
def test_lines_are_the_same_however_the_bytes_are_cut(data: bytes, places: list[int]):
    assume(data != b"\xef\xbb\xbf")
    text = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    expected = text.split(b"\n")
    assert lines_of(*cut(data, places)) == (expected if expected[-1] else expected[:-1])


def test_a_line_is_given_when_its_ending_begins():
    lines = Lines()
    assert [line.text for line in lines.feed(b"a\r")] == [b"a"]
    assert [(line.text, line.ending, line.number) for line in lines.feed(b"\nb\n")] == [(b"b", b"\n", 2)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\r\rdata:  b\r\n\r\n", [b"a", b" b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b": comment\nid: 1\nevent: x\nretry: 5\nunknown: y\ndata: a\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data\n\ndata:\n\n", []),
        (b"data: a\n\ndata: cut by the end\n", [b"a"]),
    ],
)
def test_messages_are_those_of_the_standard(data: bytes, expected: list[bytes]):
    assert messages_of(data) == expected


def ndjson(*events: Event) -> bytes:
    return "".join(f"{to_json(event)}\n" for event in events).encode()


def sse(*events: Event, ending: str = "\n") -> bytes:
    return "".join(f"data: {to_json(event)}{ending}{ending}" for event in events).encode()


@pytest.mark.parametrize("events", [LOAD, JOB])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_both_forms_give_the_same_events(events: list[Event], ending: str):
    for data in (ndjson(*events), sse(*events, ending=ending)):
        whole, _ = read(data)
        bytewise, _ = read(*(data[i : i + 1] for i in range(len(data))))
        assert whole == bytewise == events


def test_json_over_several_lines_of_data_is_one_event():
    text = "".join(f"data: {line}\r\n" for line in json.dumps(to_dict(READY), indent=1).split("\n"))
    assert read(text.encode() + b"\r\n")[0] == [READY]


def test_keep_alives_done_unknown_stages_and_lines_of_a_log_are_left_out():
    data = b": keep-alive\n\n" + sse(LOAD[0]) + b'data: {"stage":"starting","doing":"x","seq":0}\n\n'
    data += b'{"level":"info","message":"from a log"}\nHTTP/1.1 200 OK\n' + sse(READY) + b"data: [DONE]\n\n"
    events, reader = read(data)
    assert events == [LOAD[0], READY]
    assert reader.done
    assert reader.unknown == 2


def test_a_last_line_of_ndjson_needs_no_ending_and_a_cut_message_is_none():
    assert read(ndjson(READY).rstrip())[0] == [READY]
    assert read(sse(READY).rstrip())[0] == []


def test_a_refusal_is_raised_as_the_error_it_names():
    envelope = {"error": {"message": "No model was asked for.", "type": "x", "param": None, "code": "UNAVAILABLE"}}
    with pytest.raises(Unavailable, match="No model was asked for"):
        read(json.dumps(envelope).encode())


BROKEN = {
    "cut": ('{"stage":', "no JSON"),
    "list": ("[1]", "no JSON object"),
    "deep": ('{"stage":' + "[" * 200_000, "too deeply"),
    "deep and whole": ('{"a":' * 100_000 + "1" + "}" * 100_000, "too deeply"),
    "digits": (
        '{"stage":"stalled","seq":' + "9" * 400 + ',"elapsed_seconds":1,"seconds":1,"where":""}',
        "out of range",
    ),
    "thousands of digits": ('{"stage":"warming_up","seq":' + "9" * 9999 + ',"elapsed_seconds":1}', "no JSON"),
    "infinite": ('{"stage":"warming_up","seq":1,"elapsed_seconds":1e999}', "elapsed_seconds is out of range"),
    "not a number": ('{"stage":"warming_up","seq":1,"elapsed_seconds":NaN}', "elapsed_seconds is out of range"),
    "negative": ('{"stage":"warming_up","seq":-3,"elapsed_seconds":1}', "seq is negative: -3"),
    "type": ('{"stage":"warming_up","seq":"1","elapsed_seconds":1}', "seq is not an integer"),
    "missing": ('{"stage":"warming_up","seq":1}', "incomplete WarmingUp"),
    "report": ('{"stage":"ready","seq":1,"elapsed_seconds":1,"report":[]}', "report is not an object"),
    "bool": ('{"event":"token","t":"x","i":true}', "i is not an integer"),
    "null": ('{"event":"token","t":null,"i":1}', "t is not text"),
    "long": (to_json(Resolving(model="m" * 100_000, seq=0, elapsed_seconds=0.0)), "Resolving event of 100,"),
}


@pytest.mark.parametrize(("text", "what"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_event_is_told(text: str, what: str):
    with pytest.raises(ValueError, match=what):
        event_in(text)
    if text.startswith("{"):
        with pytest.raises(ValueError, match="line 3: "):
            read(b"\n\n" + text.encode() + b"\n")
    with pytest.raises(ValueError, match="line 3: "):
        read(b"\n\ndata: " + text.encode() + b"\n\n")


def test_figures_of_the_report_are_bounded_too():
    text = to_json(READY).replace('"cuda:0":200', '"cuda:0":' + "9" * 400)
    with pytest.raises(ValueError, match="device_mb is out of range"):
        event_in(text)
    assert event_in(to_json(READY)) == READY


def test_unknown_words_are_told_apart_from_broken_events():
    for text in ('{"stage":"starting"}', '{"event":"thought"}', "{}", '{"stage":{"a":[]}}'):
        with pytest.raises(UnknownEvent):
            event_in(text)


def test_bytes_that_are_no_text_are_replaced():
    events, _ = read(b'{"event":"token","t":"a\xff\xfe","i":0}\n')
    assert events == [Token(t="a\ufffd\ufffd", i=0)]


def test_megabytes_are_read_in_linear_time_and_bounded(monkeypatch: pytest.MonkeyPatch):
    big = Token(t="x" * 3_000_000, i=0)
    assert read(*cut(ndjson(big), list(range(0, 3_000_000, 1000))))[0] == [big]
    monkeypatch.setattr(wire, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="line 2 has more than 1,000 bytes"):
        read(b"\n" + b"x" * 600, b"x" * 600)
    with pytest.raises(ValueError, match="the message of line 1 has more than"):
        read(b"data: xxxxxxxxxx\n" * 200)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_whatever_comes_no_other_exception(data: bytes, places: list[int]):
    with suppress(ValueError):
        read(*cut(sse(layers(1, 1)) + data, places))


def test_an_error_event_is_an_event():
    failed = LoadFailed(code="OUT_OF_MEMORY", message="needs 8 GiB", seq=2, elapsed_seconds=1.0)
    assert read(sse(failed))[0] == [failed]
