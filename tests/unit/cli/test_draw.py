"""``draw``: what a load and a job look like when they come through a pipe, and how it ends."""

import json
import re
import time
from pathlib import Path

import pytest

from rbee_worker.cli.draw import paced, parse_speed, play
from rbee_worker.display import Silent
from rbee_worker.events import Event, InferenceFailed, LoadCancelled, LoadFailed, Token, WarmingUp, to_json
from tests.unit.cli.harness import run
from tests.unit.samples import JOB, LOAD, STARTED, TEXT, layers
from tests.unit.test_wire import BROKEN, ndjson, sse

DONE = b"data: [DONE]\n\n"


def test_a_load_is_drawn_as_load_draws_it():
    drawn = run("draw", stdin=sse(*LOAD) + DONE)
    assert drawn.exit_code == 0
    assert drawn.stdout == ""
    told = drawn.stderr.splitlines()
    assert told[0] == "    0.0 s  resolving tiny"
    # A line a second of the load's own time, not of that in which it was read.
    assert [line[:9] for line in told if "layers" in line] == ["    0.0 s", "    1.0 s", "    2.0 s", "    3.0 s"]
    assert "    3.8 s  ready: tiny [bold]model in 3.8 s" in told
    assert "  peak host memory: 1,234 MiB" in told


def test_a_job_is_text_on_stdout_and_figures_on_stderr():
    for data in (ndjson(*JOB), sse(*JOB) + DONE):
        drawn = run("draw", stdin=data)
        assert (drawn.exit_code, drawn.stdout) == (0, TEXT)
        assert "2 tokens, 10.0 tok/s" in drawn.stderr


def test_a_load_and_the_job_after_it_are_both_drawn():
    drawn = run("draw", stdin=ndjson(*LOAD, *JOB))
    assert drawn.stdout == TEXT
    assert "ready: tiny" in drawn.stderr


def test_quiet_leaves_the_text():
    drawn = run("draw", "--quiet", stdin=ndjson(*LOAD, *JOB))
    assert (drawn.stdout, drawn.stderr) == (TEXT, "")


def test_a_file_and_a_dash(tmp_path: Path):
    path = tmp_path / "load.ndjson"
    path.write_bytes(ndjson(*LOAD))
    assert run("draw", str(path)).stderr == run("draw", "-", stdin=ndjson(*LOAD)).stderr != ""


FAILED = LoadFailed(code="OUT_OF_MEMORY", message="It needs \x1b[31m8 GiB.", seq=9, elapsed_seconds=1.0)


@pytest.mark.parametrize(
    ("last", "code", "told"),
    [
        (FAILED, 5, r"error: It needs \\x1b\[31m8 GiB."),
        (LoadFailed(code="NEW", message="Newer.", seq=9, elapsed_seconds=1.0), 1, "error: Newer."),
        (LoadCancelled(vram_mb_freed=3, seq=9, elapsed_seconds=1.0), 130, "error: The load was cancelled."),
        (WarmingUp(seq=9, elapsed_seconds=1.0), 6, "was cut before its last event"),
        (InferenceFailed(code="INFERENCE_FAILED", message="A step failed."), 1, "error: A step failed."),
        (STARTED, 6, "was cut before its last event"),
    ],
)
def test_the_exit_code_is_that_of_the_end(last: Event, code: int, told: str):
    drawn = run("draw", stdin=sse(layers(1, 1), last) + DONE)
    assert drawn.exit_code == code
    assert re.search(told, drawn.stderr)
    assert "\x1b" not in drawn.stderr


def test_of_several_loads_the_last_one_decides():
    assert run("draw", stdin=ndjson(layers(1, 1), FAILED, *LOAD)).exit_code == 0
    assert run("draw", stdin=ndjson(*LOAD, layers(1, 1), FAILED)).exit_code == 5


def test_a_load_that_was_cut_and_the_next_are_two():
    drawn = run("draw", stdin=ndjson(*LOAD[:5], *LOAD))
    assert drawn.exit_code == 0
    assert drawn.stderr.count("resolving tiny") == 2


@pytest.mark.parametrize(
    "data", [b"", b"\n\n", b"<html>hello</html>", b'{"level":"info"}\n', DONE, b"\x00\xff\xfe" * 99]
)
def test_what_holds_no_events_says_so(data: bytes):
    drawn = run("draw", stdin=data)
    assert drawn.exit_code == 6
    assert "standard input holds no events" in drawn.stderr


@pytest.mark.parametrize(("text", "what"), BROKEN.values(), ids=BROKEN)
def test_broken_events_are_one_message(text: str, what: str):
    drawn = run("draw", stdin=b"data: " + text.encode() + b"\n\n")
    assert drawn.exit_code == 6
    assert "error: standard input holds no stream of events: line 1: " in drawn.stderr
    assert what.replace("\\", "") in drawn.stderr
    assert "Traceback" not in drawn.stderr
    assert len(drawn.stderr) < 2000


def test_a_refusal_has_its_exit_code():
    envelope = {"error": {"message": "The key is wrong.", "type": "x", "param": None, "code": "UNAUTHORIZED"}}
    drawn = run("draw", stdin=json.dumps(envelope))
    assert drawn.exit_code == 1
    assert "error: The key is wrong." in drawn.stderr


def test_files_that_cannot_be_read(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none"):
        drawn = run("draw", str(path))
        assert drawn.exit_code == 2
        assert f"{path} cannot be read" in drawn.stderr


def test_speeds():
    assert [parse_speed(text) for text in ("max", "0", "1", "2.5", 1.0)] == [0.0, 0.0, 1.0, 2.5, 1.0]
    for text in ("-1", "nan", "inf", "fast", "1e99", ""):
        assert run("draw", "--speed", text, stdin=ndjson(*LOAD)).exit_code == 2


def test_a_replay_waits_for_each_event_of_each_load(monkeypatch: pytest.MonkeyPatch):
    now = 50.0
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    events = [layers(4, 1, at=10.0), layers(5, 2, at=14.0), *JOB, layers(0, 1, at=1.0), layers(1, 2, at=10_001.0)]
    assert list(paced(events, 2.0)) == events
    # The first event of a load is shown at once, however late the recording began.
    assert slept[0] == pytest.approx(2.0)
    assert sum(slept) == pytest.approx(2.0 + 5000.0)
    assert max(slept) <= 3600
    slept.clear()
    assert list(paced(events, 0.0)) == events
    assert slept == []


def test_a_sink_ends_with_its_load_though_the_stream_stays_open():
    ended = []

    class Sink(Silent):
        def __exit__(self, *_: object) -> None:
            ended.append(True)

    def events():
        yield from LOAD
        assert ended == [True]
        yield from JOB

    assert play(events(), lambda _: Sink()) == JOB[-1]
    assert ended == [True, True]


def test_text_for_a_terminal_controls_nothing():
    from rbee_worker.cli.draw import _harmless

    assert _harmless(Token(t="a\x1b]0;title\x07\n\tb", i=0)) == Token(t="a\\x1b]0;title\\x07\n\tb", i=0)
    assert to_json(_harmless(STARTED)) == to_json(STARTED)
