"""``rbee-worker bench load``: the time and the memory of a load.

Each load runs in a process of its own (this module, run with ``-m``). The process waits before and after the load, so
that its memory can be read from outside.
"""

import json as jsonlib
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbee_worker import log
from rbee_worker.cli import options as opt
from rbee_worker.cli.failures import advice
from rbee_worker.config import DEFAULT_MODEL, EngineConfig
from rbee_worker.errors import InferenceError, ModelNotFound

if TYPE_CHECKING:
    from rich.table import Table

MIB = 2**20
RAW_CHUNK = 8 * MIB
EVENT_REPEATS = 200

FIGURES: Mapping[str, str] = {
    "read_seconds": "reading the files, keeping nothing, s",
    "copy_seconds": "reading them into fresh memory, s",
    "ready_seconds": "until ready, s",
    "ready_over_read": "until ready / reading",
    "ready_over_copy": "until ready / reading into memory",
    "resident_mib": "resident weights, MiB",
    "peak_host_mib": "peak host memory, MiB",
    "above_resident_mib": "peak above weights and imports, MiB",
    "events_percent": "time in events, %",
}
"""Key in the JSON -> label in the table."""

Runs = Annotated[
    int, typer.Option("--runs", metavar="N", min=1, help="How often to measure.", rich_help_panel=opt.OUTPUT_PANEL)
]


def load(
    model: opt.ModelArgument = None,
    *,
    device: opt.Device = opt.ENGINE.device,
    dtype: opt.DType = opt.ENGINE.dtype,
    quantize: opt.Quantize = opt.ENGINE.quantize,
    runs: Runs = 5,
    json: opt.Json = False,
    log_level: opt.LogLevel = "warning",
    log_format: opt.LogFormat = "text",
) -> None:
    """Measure loading: its time against reading the same files alone, and its memory from outside.

    Each run reads the files into one buffer of 8 MiB again and again, then into memory that it keeps, as any load has
    to; then it loads in a fresh process. The first reading is not counted: it warms the page cache. Prints median
    (min-max).

    Example: rbee-worker bench load model.safetensors --runs 3
    """
    log.configure(log_level, log_format)
    from rbee_worker.cli.download import resolve_shown  # noqa: PLC0415 - the formats

    source = resolve_shown(model, quiet=json)
    files = source.checkpoint.files
    read(files)
    engine = EngineConfig(device=device, dtype=dtype, quantize=quantize)
    results = [measure(model, files, engine) for _ in range(runs)]
    if json:
        out = opt.stdout()
        for result in results:
            out.write(jsonlib.dumps(result) + "\n")
        return
    from rich.console import Console  # noqa: PLC0415

    console = Console(file=opt.stdout())
    console.print(table(source.name, results))
    if results[0]["cpu_kernels"]:
        console.print(f"CPU kernels: {results[0]['cpu_kernels']}", markup=False, highlight=False)


def read(files: Sequence[Path], *, keep: bool = False) -> float:
    """Read files in order on one thread, and return the seconds that it took.

    Args:
        files: the files to read.
        keep: whether to read into new memory that is kept until the end. If not, one buffer of 8 MiB is used again and
            again.
    """
    kept = []
    buffer = mmap.mmap(-1, RAW_CHUNK)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                if keep:
                    kept.append(buffer)
                    buffer = mmap.mmap(-1, RAW_CHUNK)
    return time.perf_counter() - began


def measure(model: str | None, files: Sequence[Path], engine: EngineConfig) -> dict[str, Any]:
    """Measure one load: the figures of :data:`FIGURES`, and what was loaded.

    Args:
        model: what the process loads; None: the default model.
        files: the files of its weights, for comparison.
        engine: the settings of the load.

    Raises:
        ModelNotFound, InferenceError: the load failed. The process has written the reason to stderr.
    """
    read_seconds, copy_seconds = read(files), read(files, keep=True)
    command = [sys.executable, "-m", "rbee_worker.cli.bench.load", jsonlib.dumps([model, asdict(engine)])]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
    assert child.stdin is not None  # noqa: S101 - for mypy: both are pipes
    assert child.stdout is not None  # noqa: S101
    with child:
        child.stdout.readline()
        before = memory_of(child.pid, peak=False)
        child.stdin.write("go\n")
        child.stdin.flush()
        line = child.stdout.readline()
        peak = memory_of(child.pid, peak=True) if line else 0
        child.stdin.close()
    if not line:
        failure = ModelNotFound if child.returncode == ModelNotFound.exit_code else InferenceError
        raise failure(
            f"{model or DEFAULT_MODEL}: the load failed with exit code {child.returncode}.",
            hint="Its message is above.",
        )
    told: dict[str, Any] = jsonlib.loads(line)
    resident = sum(told["device_mb"].values())
    on_host = sum(mb for name, mb in told["device_mb"].items() if not name.startswith("cuda"))
    return {
        "model": told["model"],
        "dtype": told["dtype"],
        "kernel": told["kernel"],
        "cpu_kernels": told["cpu_kernels"],
        "storage": told["storage"],
        "read_seconds": round(read_seconds, 3),
        "copy_seconds": round(copy_seconds, 3),
        "ready_seconds": told["ready_seconds"],
        "ready_over_read": round(told["ready_seconds"] / read_seconds, 2),
        "ready_over_copy": round(told["ready_seconds"] / copy_seconds, 2),
        "resident_mib": resident,
        "peak_host_mib": peak // MIB,
        "above_resident_mib": (peak - before) // MIB - on_host,
        "events_percent": told["events_percent"],
        "phases": told["phases"],
    }


def memory_of(pid: int, *, peak: bool) -> int:
    """Resident memory of a process in bytes. ``peak``: the most it has had so far, where the system knows that."""
    import psutil  # noqa: PLC0415

    if sys.platform == "linux":
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:" if peak else "VmRSS:")[2].split()[0]) * 1024
    return int(psutil.Process(pid).memory_info().rss)  # the peak is not known, so this is the memory after the load


def table(name: str, results: Sequence[Mapping[str, Any]]) -> "Table":
    """A table of the median, minimum and maximum of each figure."""
    from rich.table import Column, Table  # noqa: PLC0415

    first = results[0]
    title = f"{name}: {first['dtype']}, {first['kernel']}, from {first['storage']}; {len(results)} runs"
    rows = Table(Column("load"), Column("median (min-max)", justify="right"), title=title, title_justify="left")
    for key, label in FIGURES.items():
        values = [result[key] for result in results]
        rows.add_row(label, f"{statistics.median(values):,.4g} ({min(values):,.4g}-{max(values):,.4g})")
    return rows


def _child(model: str | None, config: EngineConfig) -> None:
    """Load, and wait before and after. Write the figures to stdout as one line of JSON."""
    from rbee_worker.errors import RbeeError  # noqa: PLC0415
    from rbee_worker.events import LoadingEvent, LoadingToVram, Ready, to_json  # noqa: PLC0415
    from rbee_worker.runtime.engine.engine import Engine  # noqa: PLC0415
    from rbee_worker.runtime.machine.devices import resolve_device  # noqa: PLC0415

    resolve_device(config.device)  # imports torch and starts the device
    sys.stdout.write("imported\n")
    sys.stdout.flush()
    sys.stdin.readline()
    events: list[LoadingEvent] = []
    began = time.perf_counter()
    try:
        events.extend(Engine(config).load(model))
    except RbeeError as error:
        sys.stderr.write(f"error: {error.message} {advice(error)}\n")
        raise SystemExit(error.exit_code) from None
    seconds = time.perf_counter() - began
    ready = events[-1]
    assert isinstance(ready, Ready)  # noqa: S101 - nobody cancels this load
    # The time of one event: to make it and to write its JSON.
    sample = next(event for event in events if isinstance(event, LoadingToVram))
    began = time.perf_counter()
    for _ in range(EVENT_REPEATS):
        to_json(replace(sample, seq=0))
    each = (time.perf_counter() - began) / EVENT_REPEATS
    names = ("model", "dtype", "kernel", "cpu_kernels", "storage", "phases", "device_mb")
    told = {name: getattr(ready.report, name) for name in names}
    told |= {"ready_seconds": round(seconds, 3), "events_percent": round(100 * each * len(events) / seconds, 3)}
    sys.stdout.write(jsonlib.dumps({key: dict(v) if isinstance(v, Mapping) else v for key, v in told.items()}) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()
    # The operating system frees everything faster than Python would.
    os._exit(0)


if __name__ == "__main__":
    named, settings = jsonlib.loads(sys.argv[1])
    _child(named, EngineConfig(**settings))
