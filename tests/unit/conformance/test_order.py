"""Each rule of the order is told from the stream that breaks it."""

from typing import Any

import pytest

from rbee_worker.conformance.order import failures, faults_in, findings_of
from rbee_worker.events import Event, to_dict
from tests.unit.samples import JOB, LOAD

Change = Any


def told(events: list[Event]) -> list[dict[str, Any]]:
    return [to_dict(event) for event in events]


def spread() -> list[dict[str, Any]]:
    """A load onto two devices, each of which counts its own layers."""
    counts = [event for event in told(LOAD) if event["stage"] == "loading_to_vram"]
    events = [
        event | {"device": f"cuda:{place}", "layers_loaded": loaded // 2, "layers_total": 30}
        for event in counts
        for place, loaded in ((0, event["layers_loaded"] + 1), (1, event["layers_loaded"]))
    ]
    whole = [told(LOAD)[0], *events, *told(LOAD)[-2:]]
    return [event | {"seq": seq} for seq, event in enumerate(whole)]


@pytest.mark.parametrize("events", [told(LOAD), told(JOB), told(LOAD)[20:], told(LOAD)[-1:][:0] + told(JOB), spread()])
def test_whole_streams_have_no_faults(events: list[dict[str, Any]]):
    assert faults_in(events) == []
    assert all(found.ok for found in findings_of(events))


def test_a_snapshot_may_have_one_gap_and_only_there():
    load = told(LOAD)
    assert faults_in([load[20], *load[25:]]) == []
    assert "seq: 25 after 21" in faults_in([load[20], load[21], *load[25:]])
    assert faults_in([load[0], *load[5:]]) == ["seq: 5 after 0"]
    assert faults_in([load[20], load[21], *load[25:]], gaps=True) == []


def test_a_late_subscriber_sees_the_last_counts_and_the_end():
    load = told(LOAD)
    assert faults_in([load[-3], load[-1]]) == []
    assert faults_in([load[-1]]) == ["order: ready came without a loading_to_vram before it"]


def test_stages_and_fields_that_are_new_are_passed_over():
    load = told(LOAD)
    new = {"stage": "starting", "doing": "x", "seq": 0, "elapsed_seconds": 0.0}
    assert faults_in([new, *(event | {"seq": event["seq"] + 1, "new": None} for event in load)]) == []


FAILED = {"stage": "error", "code": "X", "message": "y", "seq": 33, "elapsed_seconds": 3.0}

BROKEN: dict[str, tuple[str, Change]] = {
    "no terminal": ("terminal: none came", lambda load: load[:-1]),
    "two terminals": ("terminal: ready came after error; 2 came", lambda load: [*load[:-1], FAILED, load[-1]]),
    "after the end": ("terminal: warming_up came after ready", lambda load: [*load, load[-2] | {"seq": 34}]),
    "gap": ("seq: 12 after 10", lambda load: [event for event in load if event["seq"] != 11]),
    "repeated": ("seq: 5 after 5", lambda load: [*load[:6], load[5], *load[6:]]),
    "backwards": ("seq: 5 after 3; 4 after 6", lambda load: [*load[:4], load[5], load[6], load[4], *load[7:]]),
    "no seq": ("seq: warming_up has none", lambda load: changed(load, -2, seq=None)),
    "seq of another type": ("seq: warming_up has none", lambda load: changed(load, -2, seq=True)),
    "time falls": ("elapsed_seconds: 0.1 after 2.9", lambda load: changed(load, 31, elapsed_seconds=0.1)),
    "no time": ("elapsed_seconds: warming_up has none", lambda load: changed(load, -2, elapsed_seconds="1")),
    "layers fall": ("counts: layers_loaded fell from 11 to 3", lambda load: changed(load, 13, layers_loaded=3)),
    "bytes fall": ("counts: bytes_loaded fell from", lambda load: changed(load, 13, bytes_loaded=3)),
    "too many": ("counts: layers_loaded 31 is beyond layers_total", lambda load: changed(load, 31, layers_loaded=31)),
    "negative": ("counts: layers_loaded -1 of 30", lambda load: changed(load, 1, layers_loaded=-1)),
    "no layers at the end": ("counts: warming_up came before all", lambda load: changed(load, 31, layers_loaded=29)),
    "order": ("order: resolving came after loading_to_vram", lambda load: [load[1], load[0], *load[2:]]),
    "another's events": ("events: event 3 has neither", lambda load: [*load[:2], {"status": "loading"}, *load[2:]]),
}  # fmt: skip


def changed(load: list[dict[str, Any]], place: int, **fields: Any) -> list[dict[str, Any]]:
    load[place] |= fields
    return load


@pytest.mark.parametrize(("fault", "change"), BROKEN.values(), ids=BROKEN)
def test_each_broken_rule_of_a_load_is_told(fault: str, change: Change):
    load = [event | {"seq": place} for place, event in enumerate(told(LOAD))]
    found = faults_in(change(load))
    assert any(text.startswith(fault) for text in found), found


def test_each_broken_rule_of_a_job_is_told():
    started, first, second, end = told(JOB)
    assert faults_in([started, first, end]) == []
    assert faults_in([first, second, end]) == ["order: token came first"]
    assert faults_in([started, second, end]) == ["i: 1 where 0 was due"]
    assert faults_in([started, first, first, end]) == ["i: 0 where 1 was due"]
    assert faults_in([started, first, started, end]) == ["order: started came after token"]
    assert faults_in([started, first]) == ["terminal: none came"]
    assert faults_in([end]) == []


def test_nothing_is_no_stream():
    assert failures(findings_of([])) == ["terminal: none came"]
    assert [found.check for found in findings_of([]) if found.ok is None] == [
        "events", "order", "seq", "elapsed_seconds", "counts",
    ]  # fmt: skip


def test_many_faults_are_told_in_short():
    many = [{"stage": "stalled", "seq": 0, "elapsed_seconds": 0.0}] * 9
    assert "seq: 0 after 0; 0 after 0; 0 after 0; and 5 more" in faults_in(many)
