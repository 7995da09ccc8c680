"""``rbee-worker convert``."""

import json as jsonlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from rbee_worker import log
from rbee_worker.cli import options as opt
from rbee_worker.cli.download import resolve_shown
from rbee_worker.cli.failures import interrupts
from rbee_worker.config import DTypeName

if TYPE_CHECKING:
    from rbee_worker.runtime.convert import ConvertProgress

    Show = Callable[[ConvertProgress], None]

MIB = 1024**2
LINE_SECONDS = 1.0


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=opt.MODEL_FORMS)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    *,
    dtype: Annotated[
        DTypeName,
        typer.Option(
            "--dtype",
            metavar=opt.DTYPE_METAVAR,
            help="The type weights are written in; auto: as stored, quantized ones as float16.",
            rich_help_panel=opt.MODEL_PANEL,
        ),
    ] = "auto",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    log_level: opt.LogLevel = "warning",
    log_format: opt.LogFormat = "text",
) -> None:
    """Convert a model to a folder in Hugging Face layout: safetensors, config and tokenizer.

    Example: rbee-worker convert model.gguf model-folder --dtype bfloat16
    """
    log.configure(log_level, log_format)
    from rbee_worker.runtime.convert import convert as run  # noqa: PLC0415 - numpy

    with interrupts(), _shown(json=json, quiet=quiet) as show:
        steps = run(resolve_shown(model, quiet=quiet or json), out, dtype=dtype)
        last = None
        try:
            for last in steps:
                show(last)
        finally:
            # Closing removes an unfinished file. The garbage collector might do it too late.
            close = getattr(steps, "close", None)
            if close is not None:
                close()
    if last is not None and not quiet and not json:
        how = "was converted before: nothing to do" if last.already_converted else "written"
        sys.stderr.write(f"{out}: {last.tensors_total} tensors, {last.bytes_total / MIB:,.1f} MiB, {how}\n")


@contextmanager
def _shown(*, json: bool, quiet: bool) -> "Iterator[Show]":
    """A function that shows progress: JSON on stdout; or a bar, lines, or nothing on stderr."""
    if json:
        yield _json_lines(opt.stdout())
    elif quiet:
        yield lambda progress: None  # noqa: ARG005 - shows nothing
    elif sys.stderr.isatty():
        with _bar(sys.stderr) as show:
            yield show
    else:
        yield plain_lines(sys.stderr)


def _json_lines(out: TextIO) -> "Show":
    def show(progress: "ConvertProgress") -> None:
        out.write(jsonlib.dumps(asdict(progress)) + "\n")
        out.flush()

    return show


def plain_lines(out: TextIO, clock: Callable[[], float] = time.monotonic) -> "Show":
    """A function that writes progress to ``out``: one line a second at most, and always the first and the last."""
    written_at: float | None = None

    def show(progress: "ConvertProgress") -> None:
        nonlocal written_at
        if written_at is not None and not progress.finished and clock() - written_at < LINE_SECONDS:
            return
        written_at = clock()
        out.write(
            f"{progress.tensors_done}/{progress.tensors_total} tensors, "
            f"{progress.bytes_written / MIB:,.0f}/{progress.bytes_total / MIB:,.0f} MiB\n"
        )
        out.flush()

    return show


@contextmanager
def _bar(err: TextIO) -> "Iterator[Show]":
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.fields[tensors]} tensors"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=err), redirect_stdout=False) as bars:
        task = bars.add_task("", total=None, tensors="0")

        def show(progress: "ConvertProgress") -> None:
            tensors = f"{progress.tensors_done}/{progress.tensors_total}"
            bars.update(task, total=progress.bytes_total, completed=progress.bytes_written, tensors=tensors)

        yield show
