"""``rbee-worker inspect`` and ``rbee-worker devices``: what a model is, and which devices there are."""

import json as jsonlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rbee_worker import log
from rbee_worker.cli import options as opt
from rbee_worker.cli.download import resolve_shown
from rbee_worker.escape import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rbee_worker.runtime.inspection import Inspection

GIB = 1024**3
PIPED_WIDTH = 120
"""Width in characters of a table that goes to a file or a pipe."""


def inspect(
    model: opt.ModelArgument = None,
    *,
    max_context: opt.MaxContext = opt.ENGINE.max_context,
    mmap: opt.Mmap = opt.ENGINE.mmap,
    json: opt.Json = False,
    log_level: opt.LogLevel = "warning",
    log_format: opt.LogFormat = "text",
) -> None:
    """Show what a model is and the memory it needs, from its headers and config alone; with --mmap, what is mapped.

    Example: rbee-worker inspect model.safetensors --max-context 8192
    """
    log.configure(log_level, log_format)
    from rbee_worker.runtime.inspection import inspect_model  # noqa: PLC0415

    found = inspect_model(resolve_shown(model, quiet=json), max_context, mmap=mmap)
    if json:
        _write_json(found.to_dict())
        return
    console = _console()
    console.print(_facts(found))
    console.print(_memory(found))


def devices(
    *,
    json: opt.Json = False,
    log_level: opt.LogLevel = "warning",
    log_format: opt.LogFormat = "text",
) -> None:
    """List the devices that a model can run on, with their memory; and the CPU kernels, or why there are none.

    Example: rbee-worker devices --json
    """
    log.configure(log_level, log_format)
    from rbee_worker.runtime.machine.devices import list_devices  # noqa: PLC0415 - torch
    from rbee_worker.runtime.model.linear.cpu import describe_kernels  # noqa: PLC0415

    found = list_devices()
    kernels = describe_kernels()
    if json:
        for device in found:
            _write_json(device.to_dict() | ({"cpu_kernels": kernels} if device.name == "cpu" else {}))
        return
    table = _table("device", "description", ">used", ">free", ">total")
    for device in found:
        sizes = (device.used_bytes, device.free_bytes, device.total_bytes)
        _add(table, device.name, device.description, *map(size_text, sizes))
    console = _console()
    console.print(table)
    console.print(f"CPU kernels: {kernels}", markup=False, highlight=False)


def size_text(nbytes: int) -> str:
    """A number of bytes for people: in MiB below one GiB, else in GiB."""
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= GIB else f"{nbytes / 1024**2:,.1f} MiB"


def _facts(found: "Inspection") -> "Table":
    table = _table("model", found.name)
    for key, value in found.to_dict().items():
        if key not in {"name", "memory"}:
            _add(table, key.replace("_bytes", "_size").replace("_", " "), _fact(key, value))
    return table


def _fact(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):  # dtype -> bytes
        return ", ".join(f"{name} {size_text(nbytes)}" for name, nbytes in value.items())
    if isinstance(value, int):
        return size_text(value) if key.endswith("_bytes") else f"{value:,}"
    return str(value)


def _memory(found: "Inspection") -> "Table":
    table = _table("memory needed as", ">weights", f">cache of {found.context_length:,} tokens", ">together")
    for need in found.memory:
        sizes = (need.weights_bytes, need.kv_cache_bytes, need.total_bytes)
        _add(table, need.dtype, *map(size_text, sizes))
    return table


def _table(*headers: str) -> "Table":
    """An empty table. A column whose header begins with ``>`` is aligned to the right."""
    from rich.table import Column, Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    columns = [
        Column(Text(header.removeprefix(">")), justify="right" if header.startswith(">") else "left", overflow="fold")
        for header in headers
    ]
    return Table(*columns)


def _add(table: "Table", *cells: str) -> None:
    from rich.text import Text  # noqa: PLC0415

    # Text, so that a name from a model file is never read as markup.
    table.add_row(*(Text(printable(cell)) for cell in cells))


def _console() -> "Console":
    from rich.console import Console  # noqa: PLC0415

    out = opt.stdout()
    return Console(file=out) if out.isatty() else Console(file=out, width=PIPED_WIDTH, force_terminal=False)


def _write_json(value: Mapping[str, Any]) -> None:
    out = opt.stdout()
    out.write(jsonlib.dumps(value, ensure_ascii=False) + "\n")
    out.flush()
