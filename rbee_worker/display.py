"""Sinks: they show the events of a load or of a job, and depend on nothing but events.

A sink is a context manager that is called with each event. There are :class:`LoadProgress` (bars on a terminal),
:class:`PlainProgress` (lines, for logs), :class:`JsonLines` (the events themselves), :class:`TokenPrinter` (text) and
:class:`Silent`. :func:`loading_sink` chooses the one for a load.
"""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from rbee_worker.escape import printable
from rbee_worker.events import (
    Downloading,
    End,
    Event,
    LoadCancelled,
    LoadFailed,
    LoadingEvent,
    LoadingToVram,
    LoadReport,
    Ready,
    Resolving,
    Stalled,
    Token,
    WarmingUp,
    to_json,
)

MIB = 1024 * 1024
MB = 1_000_000
BAR_WIDTH = 32
FRAMES_PER_SECOND = 8
LINE_SECONDS = 1.0


class EventSink(Protocol):
    """Takes the events of one load or of one job."""

    def __enter__(self) -> Self:
        """Start to show."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the output, also after an error."""
        ...

    def __call__(self, event: Event) -> None:
        """Show one event."""
        ...


class Silent:
    """Shows nothing: ``--quiet``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""

    def __call__(self, event: Event) -> None:
        """Drop the event."""


class JsonLines(Silent):
    """Writes one event a line, as the same bytes of JSON that SSE carries. Each line is flushed."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, event: Event) -> None:
        """Write the event."""
        self._out.write(to_json(event) + "\n")
        self._out.flush()


class LoadProgress:
    """Bars on a terminal: all bytes, and for each device layers and memory. The last state stays on the screen.

    The display shows the latest event of each kind. It is drawn at most ``FRAMES_PER_SECOND`` times a second, however
    many events there are.
    """

    def __init__(self, console: Console, *, report: bool = False, auto_refresh: bool = True) -> None:
        """Draw on ``console``. With ``report``, print the load report at the end.

        ``auto_refresh``: draw on a thread, a few times a second. If false, draw at every event.
        """
        self._console = console
        self._with_report = report
        self._spinner = Spinner("dots", text="starting")
        self._status: RenderableType = self._spinner
        self._bytes: LoadingToVram | Downloading | None = None
        self._devices: dict[str, LoadingToVram] = {}
        self._report: LoadReport | None = None
        self._live = Live(
            console=console,
            get_renderable=self.render,
            auto_refresh=auto_refresh,
            refresh_per_second=FRAMES_PER_SECOND,
            # stdout is for results.
            redirect_stdout=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._report is None and self._status is self._spinner:
            self._status = Text("interrupted" if kind is not None else "stopped", style="yellow")
        self._live.stop()
        if self._report is not None and self._with_report:
            self._console.print(report_table(self._report))

    def __call__(self, event: Event) -> None:
        """Show the event."""
        match event:
            case LoadingToVram():
                self._bytes = self._devices[event.device] = event
                self._busy("loading")
            case Downloading():
                self._bytes = event
                self._busy("downloading")
            case Ready():
                self._report = event.report
                self._status = Text(describe(event), style="green")
            case LoadFailed():
                # The message is not shown here: it follows when the error is reported.
                self._status = Text(
                    printable(f"failed after {event.elapsed_seconds:.1f} s ({event.code})"), style="red"
                )
            case LoadCancelled():
                self._status = Text(describe(event), style="yellow")
            case Stalled():
                self._busy(describe(event), style="yellow")
            case LoadingEvent():
                self._busy(describe(event))
            case _:
                return
        if not self._live.auto_refresh:
            self._live.refresh()

    def _busy(self, text: str, style: str = "") -> None:
        self._spinner.update(text=Text(text, style=style))

    def render(self) -> RenderableType:
        """The current display."""
        rows = Table.grid(Column(no_wrap=True), Column(no_wrap=True), Column(no_wrap=True), padding=(0, 1))
        if self._bytes is not None:
            done, total = _bytes_of(self._bytes)
            rows.add_row("bytes", _bar(done, total), Text(_describe_bytes(self._bytes)))
        for name, event in self._devices.items():
            rows.add_row(
                Text(printable(name)),
                _bar(event.layers_loaded, event.layers_total),
                Text(_describe_layers(event), style="cyan"),
            )
        return Group(rows, self._status) if rows.row_count else Group(self._status)


class PlainProgress:
    """Lines for a log: at most one a second, but always the first and last, and one at every change of stage."""

    def __init__(self, out: TextIO, *, report: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Write to ``out``. With ``report``, add the load report at the end. ``clock`` gives seconds."""
        self._out = out
        self._with_report = report
        self._clock = clock
        self._stage: str | None = None
        self._written_at = 0.0
        self._held: dict[str, LoadingEvent] = {}  # the latest event of each device that was not written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def __call__(self, event: Event) -> None:
        """Write the event, or hold it."""
        if not isinstance(event, LoadingEvent):
            return
        key = event.device if isinstance(event, LoadingToVram) else event.stage
        if event.stage != self._stage:
            self._release()
            self._stage = event.stage
        elif self._clock() - self._written_at < LINE_SECONDS:
            self._held[key] = event
            return
        self._held.pop(key, None)
        self._write(event)
        if isinstance(event, Ready) and self._with_report:
            self._out.writelines(f"  {name}: {value}\n" for name, value in report_rows(event.report).items())
            self._out.flush()

    def _release(self) -> None:
        """Write the held events, so that the last event of a stage is never lost."""
        for event in self._held.values():
            self._write(event)
        self._held.clear()

    def _write(self, event: LoadingEvent) -> None:
        self._out.write(f"{event.elapsed_seconds:7.1f} s  {describe(event)}\n")
        self._out.flush()
        self._written_at = self._clock()


class TokenPrinter:
    """Writes text to stdout while it is generated, then exactly one newline; and a line of figures to stderr.

    The newline is added whether or not the text ends with one.
    """

    def __init__(self, out: TextIO, stats: TextIO | None = None) -> None:
        """Write text to ``out``, and figures to ``stats`` if that is given."""
        self._out = out
        self._stats = stats
        self._open = False  # whether text was written, but not its newline

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A broken pipe cannot take a newline either.
        if self._open and not isinstance(error, BrokenPipeError):
            self._newline()

    def __call__(self, event: Event) -> None:
        """Write the text of a token, or the newline at the end."""
        if isinstance(event, Token):
            self._open = True
            self._out.write(event.t)
            self._out.flush()
        elif isinstance(event, End):
            self._newline()
            if self._stats is not None:
                self._stats.write(describe_end(event) + "\n")
                self._stats.flush()

    def _newline(self) -> None:
        self._open = False
        self._out.write("\n")
        self._out.flush()


def loading_sink(
    *,
    json: bool,
    quiet: bool,
    report: bool,
    out: TextIO,
    err: TextIO,
    clock: Callable[[], float] = time.monotonic,
) -> EventSink:
    """The sink for a load.

    Args:
        json: write events to ``out``.
        quiet: show nothing, unless ``json``.
        report: show the load report at the end, but not with ``json``.
        out: for events.
        err: for bars if it is a terminal, else for lines.
        clock: gives the seconds by which there is at most one line a second.
    """
    if json:
        return JsonLines(out)
    if quiet:
        return Silent()
    console = Console(file=err)
    # Bars need a terminal that can move its cursor. TERM=dumb says that it cannot.
    if not err.isatty() or console.is_dumb_terminal:
        return PlainProgress(err, report=report, clock=clock)
    return LoadProgress(console, report=report)


def describe(event: LoadingEvent) -> str:
    """An event in one line of text, without its time."""
    match event:
        case Resolving():
            text = f"resolving {event.model}"
        case Downloading():
            text = f"downloading: {_describe_bytes(event)}"
        case LoadingToVram():
            text = f"loading to {event.device}: {_describe_layers(event)}; read {_describe_bytes(event)}"
        case WarmingUp():
            text = "warming up"
        case Stalled():
            text = f"stalled: no data for {event.seconds:.0f} s from {event.where}"
        case Ready():
            text = f"ready: {event.report.model} in {event.elapsed_seconds:.1f} s"
        case LoadFailed():
            text = f"failed ({event.code})"
        case LoadCancelled():
            text = f"cancelled, {event.vram_mb_freed:,} MiB freed"
        case _:
            text = event.stage
    return printable(text)  # names of files and models


def describe_end(event: End) -> str:
    """The figures of a finished job in one line of text."""
    why: str = event.stop_reason
    if event.stop_sequence_matched is not None:
        why += f" {event.stop_sequence_matched!r}"
    cached = f" ({event.cached_tokens} cached)" if event.cached_tokens else ""
    return printable(
        f"{event.tokens_out} tokens, {event.tokens_per_second:.1f} tok/s; prompt {event.prompt_tokens} tokens{cached} "
        f"in {event.prefill_time_ms / 1000:.2f} s; stopped by {why}"
    )


def report_rows(report: LoadReport) -> Mapping[str, str]:
    """The load report: label -> value with its unit."""
    rows = {
        "model": f"{report.model} ({report.architecture}, {report.parameters / 1e6:,.1f} M parameters)",
        "weights": f"{report.dtype}, {report.kernel}",
    }
    if report.quantize != "none":
        # Without the worker's own kernels the embedding is not quantized.
        embedding = f", embedding {report.dtype}" if report.kernel.endswith("int8") else ""
        rows["weights"] = f"{report.quantize} ({report.kernel}){embedding}"
        rows["saved"] = f"{report.saved_mb:,} MiB against 16 bits"
    if report.stored_as:
        rows["stored as"] = report.stored_as
    if report.runs_as:
        rows["runs as"] = report.runs_as
    if report.cpu_kernels:
        rows["CPU kernels"] = report.cpu_kernels
    rows |= {name.replace("_", " "): f"{seconds:.2f} s" for name, seconds in report.phases.items()}
    rows["read"] = f"{report.bytes_read / MIB:,.1f} MiB at {report.bytes_per_second / MB:,.0f} MB/s"
    if report.storage:
        rows["from"] = report.storage
    if report.mapped_mb:
        rows["mapped"] = f"{report.mapped_mb:,} MiB of weights; the others were read"
    rows |= {f"memory on {device}": f"{mb:,} MiB" for device, mb in report.device_mb.items()}
    if report.kv_cache_tokens:
        rows["context"] = f"{report.context_length:,} tokens"
        rows["KV cache"] = f"{report.kv_cache_tokens:,} tokens, {report.kv_cache_mb:,} MiB"
        if report.kv_cache_dtype:
            rows["KV cache"] += f", {report.kv_cache_dtype}"
    rows["peak host memory"] = f"{report.peak_host_mb:,} MiB"
    return {printable(name): printable(value) for name, value in rows.items()}


def report_table(report: LoadReport) -> Table:
    """The load report as a table."""
    table = Table(Column(style="bold"), Column(), title="Load report", title_justify="left", show_header=False)
    for name, value in report_rows(report).items():
        table.add_row(name, Text(value))
    return table


def _describe_bytes(event: LoadingToVram | Downloading) -> str:
    done, total = _bytes_of(event)
    text = f"{done / MIB:,.0f}/{total / MIB:,.0f} MiB"
    if isinstance(event, Downloading):
        return f"{text}, {event.speed_mbps:,.1f} MB/s"
    if event.bytes_per_second:
        text += f", {event.bytes_per_second / MB:,.0f} MB/s"
    return text if event.eta_seconds is None else f"{text}, {_duration(event.eta_seconds)} left"


def _describe_layers(event: LoadingToVram) -> str:
    return f"{event.layers_loaded}/{event.layers_total} layers, memory {event.vram_mb:,}/{event.vram_total_mb:,} MiB"


def _bytes_of(event: LoadingToVram | Downloading) -> tuple[int, int]:
    if isinstance(event, Downloading):
        return event.bytes_downloaded, event.bytes_total
    return event.bytes_loaded, event.bytes_total


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"  # noqa: PLR2004 - seconds in a minute


def _bar(done: int, total: int) -> ProgressBar:
    return ProgressBar(
        total=max(total, 1), completed=done, width=BAR_WIDTH, complete_style="cyan", finished_style="green"
    )
