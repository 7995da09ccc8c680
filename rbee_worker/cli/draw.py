"""``rbee-worker draw``: draws events that were recorded, or that come through a pipe."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from rbee_worker import log
from rbee_worker.cli import options as opt
from rbee_worker.cli.failures import interrupts
from rbee_worker.errors import Cancelled, InvalidRequest, WorkerUnreachable, error_of
from rbee_worker.escape import printable, reason
from rbee_worker.events import (
    Event,
    InferenceFailed,
    LoadCancelled,
    LoadFailed,
    LoadingEvent,
    Started,
    Token,
)
from rbee_worker.wire import EventReader

if TYPE_CHECKING:
    from rbee_worker.display import EventSink

CHUNK_BYTES = 2**16
LONGEST_SLEEP = 3600.0
AT_ONCE = 0.0


def parse_speed(text: str | float) -> float:
    """How many times faster than recorded; 0 and ``max``: at once.

    Raises:
        typer.BadParameter: the text is neither a number from 0 to 1,000,000 nor ``max``.
    """
    try:
        speed = AT_ONCE if text == "max" else float(text)
    except ValueError:
        speed = -1.0
    if not 0 <= speed <= 1e6:  # noqa: PLR2004 - nobody sees more
        raise typer.BadParameter(f"{text!r} is no speed; write 1, 2.5, or max.")
    return speed


File = Annotated[
    Path | None, typer.Argument(metavar="FILE", help="What was recorded. Without it, and with -: standard input.")
]
Speed = Annotated[
    float,
    typer.Option(
        "--speed",
        metavar="N",
        parser=parse_speed,
        help="Replay a load N times as fast as it was; 0 or max: as fast as its events can be read.",
        rich_help_panel=opt.OUTPUT_PANEL,
    ),
]


def draw(
    file: File = None,
    *,
    speed: Speed = "max",  # type: ignore[assignment]  # Typer parses the default too
    quiet: opt.Quiet = False,
    log_level: opt.LogLevel = "warning",
    log_format: opt.LogFormat = "text",
) -> None:
    """Draw events from a file or a pipe: bars and report of a load, the text of a job.

    The events are lines of --json, or a stream as HTTP sends it, also from another machine. The exit code is that of
    the load or job.

    Example: rbee-worker draw load.ndjson --speed 1
    """
    log.configure(log_level, log_format)
    from rbee_worker.display import TokenPrinter, loading_sink  # noqa: PLC0415 - rich

    out, err = opt.stdout(), opt.stderr()
    watch = StreamClock()

    def sink_for(first: Event) -> "EventSink":
        if isinstance(first, LoadingEvent):
            return loading_sink(json=False, quiet=quiet, report=True, out=out, err=err, clock=watch)
        return TokenPrinter(out, None if quiet else err)

    name = "standard input" if file is None or str(file) == "-" else str(file)
    with interrupts(), _opened(file) as source:
        events = watch.follow(paced(read(source, name), speed))
        last = play(map(_harmless, events) if out.isatty() else events, sink_for)
    conclude(last, name)


class StreamClock:
    """Tells the time of a stream: ``elapsed_seconds`` of its newest loading event."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        """The time in seconds."""
        return self._seconds

    def follow(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events; the clock is set by each before it is given."""
        for event in events:
            if isinstance(event, LoadingEvent):
                self._seconds = event.elapsed_seconds
            yield event


def read(source: BinaryIO, name: str) -> Iterator[Event]:
    """The events of a file or a pipe, each as soon as it is there.

    Raises:
        WorkerUnreachable: something in it is no event, though it looks like one.
        InvalidRequest: the file cannot be read.
        RbeeError: it holds a worker's refusal instead of events.
    """
    reader = EventReader()
    try:
        while data := source.read1(CHUNK_BYTES):  # type: ignore[attr-defined]  # all that are opened here have it
            yield from reader.feed(data)
        yield from reader.end()
    except OSError as error:
        raise InvalidRequest(f"{name} cannot be read: {reason(error)}.") from None
    except ValueError as error:
        raise WorkerUnreachable(f"{name} holds no stream of events: {error}.", hint=_EXPECTED) from None


_EXPECTED = "Give what `--json` writes, or what a worker streams."


def paced(events: Iterable[Event], speed: float) -> Iterator[Event]:
    """The events, those of a load held back until their time; ``speed`` as :func:`parse_speed` gives it."""
    began, last = 0.0, None
    for event in events:
        if speed and isinstance(event, LoadingEvent):
            if last is None or event.elapsed_seconds < last:  # a load begins
                began = time.monotonic() - event.elapsed_seconds / speed
            last = event.elapsed_seconds
            while (left := began + last / speed - time.monotonic()) > 0:
                time.sleep(min(left, LONGEST_SLEEP))
        yield event


def play(events: Iterable[Event], sink_for: Callable[[Event], "EventSink"]) -> Event | None:
    """Show each load and each job with a sink of its own, made for its first event. Returns the last event of all."""
    rest = iter(events)
    last, following = None, next(rest, None)
    while following is not None:
        first, following = following, None
        with sink_for(first) as sink:
            for event in chain([first], rest):
                if event is not first and _begins_another(event, last):
                    following = event
                    break
                last = event
                sink(event)
                if event.terminal:
                    break
        # The sink has ended by now: its last words are there, however long the stream stays open.
        if following is None:
            following = next(rest, None)
    return last


def _begins_another(event: Event, last: Event | None) -> bool:
    """Whether a load or a job begins, though that of ``last`` did not end."""
    if isinstance(event, LoadingEvent):
        return not isinstance(last, LoadingEvent) or event.seq < last.seq
    return isinstance(last, LoadingEvent) or isinstance(event, Started)


def conclude(last: Event | None, name: str) -> None:
    """Raise what the last event says.

    Raises:
        WorkerUnreachable: the stream had no event, or was cut before its last one.
        Cancelled: the load was cancelled.
        RbeeError: the load or the job failed.
    """
    if last is None:
        raise WorkerUnreachable(f"{name} holds no events.", hint=_EXPECTED)
    if not last.terminal:
        raise WorkerUnreachable(f"The stream of {name} was cut before its last event.")
    if isinstance(last, LoadFailed | InferenceFailed):
        raise error_of(last.code, last.message)
    if isinstance(last, LoadCancelled):
        raise Cancelled("The load was cancelled.")


def _harmless(event: Event) -> Event:
    """The event, its text without what would control a terminal."""
    if isinstance(event, Token) and not event.t.isprintable():
        return replace(event, t="".join(c if c in "\n\t" else printable(c) for c in event.t))
    return event


@contextmanager
def _opened(file: Path | None) -> Iterator[BinaryIO]:
    """The file, or standard input.

    Raises:
        InvalidRequest: it cannot be opened, or nothing was piped in.
    """
    if file is None or str(file) == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise InvalidRequest(
                "Nothing was piped in, and no FILE was given.",
                hint="Example: curl -N http://HOST:PORT/v1/loading/progress | rbee-worker draw",
            )
        yield sys.stdin.buffer
        return
    try:
        source = file.open("rb")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{file} cannot be read: {reason(error)}.") from None
    with source:
        yield source
