"""What is drawn, written and printed for the same events."""

import io
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

from rbee_worker.display import (
    EventSink,
    JsonLines,
    LoadProgress,
    PlainProgress,
    Silent,
    TokenPrinter,
    describe_end,
    loading_sink,
    report_rows,
)
from rbee_worker.events import (
    Downloading,
    Event,
    InferenceFailed,
    LoadCancelled,
    LoadFailed,
    LoadingEvent,
    Resolving,
    Stalled,
    Token,
    WarmingUp,
    to_json,
)
from tests.unit.samples import END, LOAD, MIB, REPORT, STARTED, layers


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Flushes(io.StringIO):
    """Remembers what had been written at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def flush(self) -> None:
        self.seen.append(self.getvalue())


def screen(width: int = 100) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=40, color_system=None, _environ={"TERM": "xterm"}
    )


def shown(console: Console) -> str:
    """What a terminal would still show: the part after the last time the cursor was taken up."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rpartition("\x1b[2K")[2]


def feed(sink: EventSink, events: list[Event], then: type[BaseException] | None = None) -> None:
    """Give ``events`` to ``sink``; with ``then``, break off with it."""
    with sink:
        for event in events:
            sink(event)
        if then is not None:
            raise then


# -- bars


def test_the_last_state_stays_on_the_screen():
    console = screen()
    feed(LoadProgress(console, auto_refresh=False), LOAD)
    text = shown(console)
    assert "30/30 layers, memory 300/8,192 MiB" in text
    assert "300/300 MiB, 140 MB/s" in text
    assert "ready: tiny [bold]model in 3.8 s" in text
    assert "Load report" not in text


def test_bars_of_each_device_and_one_of_bytes():
    console = screen()
    progress = LoadProgress(console, auto_refresh=False)
    with progress:
        progress(layers(1, 12, device="cuda:0"))
        progress(layers(2, 3, device="cuda:1"))
    still = screen()
    with still.capture() as capture:
        still.print(progress.render())
    lines = capture.get().splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["bytes", "cuda:0", "cuda:1"]
    assert "30/300 MiB, 140 MB/s, 1:15 min left" in lines[0]
    assert "12/30 layers, memory 120/8,192 MiB" in lines[1]
    assert "3/30 layers" in lines[2]
    assert "stopped" in lines[3]  # it was left without a terminal event


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Resolving(model="org/[red]name", seq=0, elapsed_seconds=0.0), "resolving org/[red]name"),
        (
            Stalled(seconds=12.3, where="model.safetensors", seq=1, elapsed_seconds=13.0),
            "no data for 12 s from model.s",
        ),
        (WarmingUp(seq=2, elapsed_seconds=1.0), "warming up"),
        (LoadCancelled(vram_mb_freed=2048, seq=3, elapsed_seconds=1.0), "cancelled, 2,048 MiB freed"),
        (
            LoadFailed(code="OUT_OF_MEMORY", message="m", seq=3, elapsed_seconds=1.0),
            "failed after 1.0 s (OUT_OF_MEMORY)",
        ),
        (
            Downloading(bytes_downloaded=MIB, bytes_total=4 * MIB, speed_mbps=1.5, seq=1, elapsed_seconds=1.0),
            "1/4 MiB, 1.5 MB/s",
        ),
    ],
)
def test_every_stage_is_shown(event: LoadingEvent, text: str):
    console = screen()
    feed(LoadProgress(console, auto_refresh=False), [event])
    assert isinstance(console.file, io.StringIO)
    assert text in console.file.getvalue()


def test_an_interrupt_leaves_the_cursor_and_says_so():
    console = screen()
    with pytest.raises(KeyboardInterrupt):
        feed(LoadProgress(console, auto_refresh=False), [layers(1, 5)], KeyboardInterrupt)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")
    assert "5/30 layers" in shown(console)
    assert "interrupted" in shown(console)


def test_stalled_gives_way_to_loading():
    console = screen()
    feed(
        LoadProgress(console, auto_refresh=False),
        [layers(1, 1), Stalled(seconds=10, where="f", seq=2, elapsed_seconds=11.0), layers(3, 2)],
    )
    assert "stalled" not in shown(console)


def test_the_report_is_a_table_under_the_bars():
    console = screen()
    feed(LoadProgress(console, report=True, auto_refresh=False), LOAD)
    text = shown(console)
    assert text.index("ready") < text.index("Load report")
    for value in report_rows(REPORT).values():
        assert value in text


@pytest.mark.parametrize("width", [20, 40, 200])
def test_any_width_will_do(width: int):
    console = screen(width)
    feed(LoadProgress(console, report=True, auto_refresh=False), LOAD)
    assert isinstance(console.file, io.StringIO)
    assert "30/30" in console.file.getvalue() or width < 60


def test_inference_events_are_none_of_its_business():
    console = screen()
    feed(LoadProgress(console, auto_refresh=False), [*LOAD, Token(t="secret", i=0), END])
    assert isinstance(console.file, io.StringIO)
    assert "secret" not in console.file.getvalue()


# -- lines


def test_at_most_one_line_a_second_but_first_last_and_changes():
    out, clock = io.StringIO(), Clock()
    with PlainProgress(out, clock=clock) as progress:
        for event in LOAD:
            clock.now = 100.0 + event.elapsed_seconds if isinstance(event, LoadingEvent) else clock.now
            progress(event)
    lines = out.getvalue().splitlines()
    layers_seen = [line.split("cpu: ")[1].split("/")[0] for line in lines if "layers" in line]
    assert layers_seen == ["0", "10", "20", "30"]
    assert "resolving tiny" in lines[0]
    assert "warming up" in lines[-2]
    assert "ready" in lines[-1]


def test_the_last_of_a_stage_is_written_though_it_came_too_soon():
    out, clock = io.StringIO(), Clock()
    feed(
        PlainProgress(out, clock=clock),
        [layers(1, 0), layers(2, 29), layers(3, 30), WarmingUp(seq=4, elapsed_seconds=1)],
    )
    assert [line.split("  ")[-1][:20] for line in out.getvalue().splitlines()] == [
        "loading to cpu: 0/30",
        "loading to cpu: 30/3",
        "warming up",
    ]


def test_a_load_that_breaks_off_still_shows_its_last_state():
    out, clock = io.StringIO(), Clock()
    events: list[Event] = [layers(1, 0), layers(2, 7, device="cuda:0"), layers(3, 9, device="cuda:1")]
    with pytest.raises(RuntimeError):
        feed(PlainProgress(out, clock=clock), events, RuntimeError)
    assert "cuda:0: 7/30" in out.getvalue()
    assert "cuda:1: 9/30" in out.getvalue()


def test_a_long_load_is_a_short_log():
    out, clock = io.StringIO(), Clock()
    with PlainProgress(out, clock=clock) as progress:
        for n in range(10_000):  # 100 seconds of events
            clock.now = 100.0 + n / 100
            progress(layers(n, 0, at=n / 100))
    times = [float(line.split()[0]) for line in out.getvalue().splitlines()]
    assert len(times) <= 102
    assert all(later - earlier >= 0.9 for earlier, later in pairwise(times[:-1]))


def test_the_report_follows_ready():
    out = io.StringIO()
    feed(PlainProgress(out, report=True), LOAD)
    lines = out.getvalue().splitlines()
    assert lines[-1] == "  peak host memory: 1,234 MiB"
    assert "  memory on cuda:1: 100 MiB" in lines
    assert "\x1b" not in out.getvalue()


def test_what_quantizing_saves_is_told():
    rows = report_rows(replace(REPORT, quantize="int8", kernel="int8", saved_mb=1200, stored_as=""))
    assert rows["weights"] == "int8 (int8), embedding float16"
    assert rows["saved"] == "1,200 MiB against 16 bits"
    assert report_rows(replace(REPORT, quantize="int4", kernel="avx2"))["weights"] == "int4 (avx2)"
    assert "stored as" not in rows
    assert "saved" not in report_rows(REPORT)


# -- JSON


def test_json_lines_are_the_events_flushed_one_by_one():
    out = Flushes()
    events = [*LOAD, Token(t="é✓\u2028 \x85", i=0), END]
    feed(JsonLines(out), events)
    assert out.getvalue() == "".join(to_json(event) + "\n" for event in events)
    assert len(out.seen) == len(events)
    assert all(text.endswith("\n") for text in out.seen)


# -- text


def test_text_as_it_comes_and_one_newline():
    out, stats = Flushes(), io.StringIO()
    feed(TokenPrinter(out, stats), [STARTED, Token(t=" Hé", i=0), Token(t="llo", i=1), END])
    assert out.seen == [" Hé", " Héllo", " Héllo\n"]
    assert stats.getvalue() == (
        "2 tokens, 10.0 tok/s; prompt 12 tokens (4 cached) in 0.25 s; stopped by stop_sequence '\\n'\n"
    )


@pytest.mark.parametrize("text", ["", "ends\n", "\n\n", "x"])
def test_exactly_one_newline_follows_any_text(text: str):
    out = io.StringIO()
    feed(TokenPrinter(out), [STARTED, *([Token(t=text, i=0)] if text else []), END])
    assert out.getvalue() == text + "\n"


def test_broken_off_text_gets_its_newline_too():
    for last in ([], [InferenceFailed(code="INFERENCE_FAILED", message="m")]):
        out = io.StringIO()
        feed(TokenPrinter(out), [STARTED, Token(t="so far", i=0), *last])
        assert out.getvalue() == "so far\n"
    out = io.StringIO()
    feed(TokenPrinter(out), [STARTED, InferenceFailed(code="INFERENCE_FAILED", message="m")])
    assert out.getvalue() == ""


def test_a_broken_pipe_is_not_written_to_again():
    out = io.StringIO()
    with pytest.raises(BrokenPipeError):
        feed(TokenPrinter(out), [Token(t="x", i=0)], BrokenPipeError)
    assert out.getvalue() == "x"


# -- the choice


def test_which_display_for_whom(monkeypatch: pytest.MonkeyPatch):
    def chosen(err: io.StringIO, *, json: bool = False, quiet: bool = False) -> type:
        return type(loading_sink(json=json, quiet=quiet, report=True, out=io.StringIO(), err=err))

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a wish about colour, not about bars in a log
    assert chosen(Terminal()) is LoadProgress
    assert chosen(io.StringIO()) is PlainProgress
    assert chosen(Terminal(), quiet=True) is Silent
    assert chosen(Terminal(), json=True, quiet=True) is JsonLines
    monkeypatch.setenv("TERM", "dumb")
    assert chosen(Terminal()) is PlainProgress


def test_no_color(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    written = []
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        err = Terminal()
        feed(loading_sink(json=False, quiet=False, report=True, out=io.StringIO(), err=err), LOAD)
        written.append(err.getvalue())
    coloured, plain = written
    assert "\x1b[32m" in coloured  # green: ready
    assert "\x1b[32m" not in plain
    assert "\x1b[36m" not in plain


def test_quiet_is_silent():
    feed(Silent(), LOAD)


def test_what_a_worker_elsewhere_says_of_itself_cannot_draw() -> None:
    draws = "x\x1b[2J\x9b31m\u202e\nforged"
    report = replace(REPORT, model=draws, architecture=draws, kernel=draws, storage=draws, device_mb={draws: 1})
    assert all((name + value).isprintable() for name, value in report_rows(report).items())
    assert describe_end(replace(END, stop_reason=draws)).isprintable()  # type: ignore[arg-type]
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=200)
    events = [replace(LOAD[1], device=draws), LoadFailed(seq=9, elapsed_seconds=1.0, code=draws, message=draws)]
    with LoadProgress(console, auto_refresh=False) as show:
        for event in events:
            show(event)
    assert all(line.isprintable() for line in out.getvalue().split("\n"))
