"""The vocabulary of events: one JSON form, readable back."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rbee_worker import events
from rbee_worker.events import Event, InferenceEvent, LoadingEvent, LoadingToVram, Token, from_dict, to_dict, to_json
from tests.unit.samples import READY

EVENT_TYPES = [
    kind
    for kind in vars(events).values()
    if isinstance(kind, type) and issubclass(kind, LoadingEvent | InferenceEvent) and "terminal" in dir(kind)
    if kind not in {LoadingEvent, InferenceEvent}
]

text = st.text(max_size=20)
count = st.integers(0, 2**53)
seconds = st.floats(0, 1e9)
report = st.builds(
    events.LoadReport,
    model=text,
    architecture=text,
    parameters=count,
    dtype=text,
    kernel=text,
    phases=st.dictionaries(text, seconds, max_size=3),
    bytes_read=count,
    bytes_per_second=count,
    device_mb=st.dictionaries(text, count, max_size=3),
    peak_host_mb=count,
)


logprob = st.builds(
    events.TokenLogprob,
    id=count,
    token=text,
    bytes=st.lists(st.integers(0, 255), max_size=3).map(tuple),
    logprob=st.none() | seconds,
)
logprobs = st.lists(logprob, max_size=2).map(tuple)


def event_of(kind: type[Event]) -> st.SearchStrategy[Event]:
    by_type: dict[Any, st.SearchStrategy[Any]] = {
        int: count,
        float: seconds,
        str: text,
        events.LoadReport: report,
        float | None: st.none() | seconds,
        str | None: st.none() | text,
        tuple[events.TokenLogprob, ...]: logprobs,
        tuple[events.TokenLogprob, ...] | None: st.none() | logprobs,
        events.StopReason: st.sampled_from(["eos", "max_tokens"]),
    }
    return st.builds(kind, **{f.name: by_type[f.type] for f in dataclasses.fields(kind)})


def told(token: str, logprob: float | None, *top: events.TokenLogprob) -> events.TokenLogprob:
    return events.TokenLogprob(id=1, token=token, bytes=tuple(token.encode()), logprob=logprob, top=top)


any_event = st.one_of([event_of(kind) for kind in EVENT_TYPES])


def test_every_event_is_covered():
    assert len(EVENT_TYPES) == 14


@example(Token(t="a", i=0, logprobs=(told("a", -0.5, told("b", -1.5)),)))
@example(events.PromptLogprobs(logprobs=(told("a", None), told("b", -0.5))))
@example(READY)
@given(any_event)
def test_json_round_trip(event: Event):
    line = to_json(event)
    assert "\n" not in line
    assert from_dict(json.loads(line)) == event


@given(any_event)
def test_discriminator_first_none_left_out_seq_last(event: Event):
    keys = list(to_dict(event))
    assert keys[0] == ("stage" if isinstance(event, LoadingEvent) else "event")
    assert None not in to_dict(event).values()
    if isinstance(event, LoadingEvent):
        assert keys[-2:] == ["seq", "elapsed_seconds"]


@given(any_event, st.dictionaries(text.map("new_".__add__), count, max_size=3))
def test_unknown_keys_are_ignored(event: Event, more: dict[str, int]):
    assert from_dict({**to_dict(event), **more}) == event


def test_the_contract_line_by_line():
    event = LoadingToVram(
        layers_loaded=12,
        layers_total=32,
        vram_mb=2048,
        vram_total_mb=8192,
        device="cuda:0",
        bytes_loaded=1,
        bytes_total=2,
        bytes_per_second=3,
        seq=4,
        elapsed_seconds=0.5,
    )
    assert to_json(event) == (
        '{"stage":"loading_to_vram","layers_loaded":12,"layers_total":32,"vram_mb":2048,"vram_total_mb":8192,'
        '"device":"cuda:0","bytes_loaded":1,"bytes_total":2,"bytes_per_second":3,"seq":4,"elapsed_seconds":0.5}'
    )
    assert to_json(Token(t="é✓", i=0)) == '{"event":"token","t":"é✓","i":0}'


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({}, "not an event"),
        ({"stage": "unheard_of"}, "not an event"),
        ({"event": "token", "t": "x"}, "incomplete Token"),
        ({"stage": "ready", "seq": 1, "elapsed_seconds": 1.0, "report": {"model": "m"}}, "incomplete Ready"),
    ],
)
def test_what_is_no_event_is_a_value_error(data: dict[str, Any], what: str):
    with pytest.raises(ValueError, match=what):
        from_dict(data)


def test_events_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Token(t="x", i=0).i = 1  # type: ignore[misc]


def test_exactly_the_last_events_are_terminal():
    terminal = {kind.__name__ for kind in EVENT_TYPES if kind.terminal}
    assert terminal == {"Ready", "LoadFailed", "LoadCancelled", "End", "InferenceFailed"}
