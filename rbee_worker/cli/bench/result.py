"""What ``bench decode`` and ``bench serve`` found: JSON, a table, and ratios to what they found before."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbee_worker import __version__
from rbee_worker.cli import options as opt
from rbee_worker.cli.bench.machine import describe
from rbee_worker.errors import InvalidRequest, ModelMalformed
from rbee_worker.escape import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAX_FILE_BYTES = 2**22
PIPED_WIDTH = 120
"""Columns of a table that goes into a pipe or a file."""

Compare = Annotated[
    Path | None,
    typer.Option(
        "--compare",
        metavar="FILE",
        help="What --json of the same command wrote before; the ratio of each figure to it is told too.",
        rich_help_panel=opt.OUTPUT_PANEL,
    ),
]


@dataclass(frozen=True, slots=True)
class Figure:
    """What a figure is: its words in the table, and its unit (empty: a plain number)."""

    label: str
    unit: str


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure of several rounds: the median, the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one value or more."""
        return cls(statistics.median(values), min(values), max(values))

    def over(self, before: "Spread") -> "Spread":
        """The ratio of two spreads: of the medians, and the least and most that the extremes allow."""
        return Spread(self.median / before.median, self.least / before.most, self.most / before.least)

    def __str__(self) -> str:
        return f"{self.median:,.4g} ({self.least:,.4g}-{self.most:,.4g})"

    def to_dict(self) -> dict[str, float]:
        """JSON form."""
        return {"median": _short(self.median), "min": _short(self.least), "max": _short(self.most)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a benchmark found.

    Attributes:
        bench: ``decode`` or ``serve``.
        machine, model, settings: where, of what and how it was measured.
        figures: every figure that this benchmark may have, by its key in the JSON.
        rounds: the values of each round, by key.
        left_out: keys that were not measured, and why.
        also: further keys of the JSON.
        notes: lines below the table.
    """

    bench: str
    machine: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    figures: Mapping[str, Figure]
    rounds: Sequence[Mapping[str, float]]
    left_out: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def title(self) -> str:
        """The model, how it runs, and how often it was measured."""
        return f"{_named(self.model)}; {len(self.rounds)} round{'s' if len(self.rounds) != 1 else ''}"

    def values(self, key: str) -> list[float]:
        """A figure's value in each round that has it."""
        return [values[key] for values in self.rounds if key in values]

    @property
    def spreads(self) -> dict[str, Spread]:
        """The spread of every figure that was measured, in the order of ``figures``."""
        return {key: Spread.of(values) for key in self.figures if (values := self.values(key))}

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        figures = {
            key: {"unit": self.figures[key].unit} | spread.to_dict() | {"values": [*map(_short, self.values(key))]}
            for key, spread in self.spreads.items()
        }
        return {
            "bench": self.bench,
            "version": __version__,
            "machine": dict(self.machine),
            "model": dict(self.model),
            "settings": dict(self.settings),
            "figures": figures,
            "left_out": dict(self.left_out),
            **self.also,
        }


@dataclass(frozen=True, slots=True)
class Former:
    """A result of before, from a file."""

    file: str
    machine: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    spreads: Mapping[str, Spread]

    def ratios(self, now: Mapping[str, Spread]) -> dict[str, Spread]:
        """Now over before, for the figures that both have and whose ratio exists."""
        return {
            key: spread.over(before)
            for key, spread in now.items()
            if (before := self.spreads.get(key)) is not None and before.least > 0
        }


def read_former(path: Path, bench: str) -> Former:
    """What ``--json`` of a benchmark wrote.

    Raises:
        InvalidRequest: the file is not there, or is not that.
    """
    from rbee_worker.runtime.untrusted import parse_json_object  # noqa: PLC0415

    hint = f"Give a file that `rbee-worker bench {bench} --json` wrote."
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"--compare {path}: {error.strerror or error}.", hint=hint) from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest(f"--compare {path}: larger than {MAX_FILE_BYTES} bytes.", hint=hint)
    try:
        found = parse_json_object(data, what=f"--compare {path}")
    except ModelMalformed as error:
        raise InvalidRequest(error.message, hint=hint) from None
    if found.get("bench") != bench:
        of = found.get("bench")
        what = f"a result of bench {of}" if of in ("decode", "serve") else "no result of a benchmark"
        raise InvalidRequest(f"--compare {path}: {what}, not of bench {bench}.", hint=hint)
    parts = {name: found.get(name) for name in ("machine", "model", "settings", "figures")}
    if missing := [name for name, part in parts.items() if not isinstance(part, dict)]:
        raise InvalidRequest(f"--compare {path}: {missing[0]} is missing.", hint=hint)
    spreads = {}
    for key, figure in found["figures"].items():
        values = [figure.get(name) if isinstance(figure, dict) else None for name in ("median", "min", "max")]
        if not all(map(_is_measure, values)):
            raise InvalidRequest(f"--compare {path}: figure {key!r:.80} has no median, min and max.", hint=hint)
        spreads[key] = Spread(*map(float, values))  # type: ignore[arg-type]  # they are numbers
    return Former(str(path), found["machine"], found["model"], found["settings"], spreads)


def tell(result: Result, former: Former | None, *, as_json: bool) -> None:
    """Write a result to stdout, with its ratios to a former one."""
    out = opt.stdout()
    ratios = former.ratios(result.spreads) if former is not None else {}
    if as_json:
        told = result.to_dict()
        if former is not None:
            told["compared"] = {"file": former.file, "ratios": {key: r.to_dict() for key, r in ratios.items()}}
        out.write(json.dumps(told, ensure_ascii=False) + "\n")
        out.flush()
        return
    on = console()
    on.print(table(result, former, ratios))
    for line in remarks(result, former):
        on.print(printable(line), markup=False, highlight=False)


def console() -> "Console":
    """Standard output for tables: of a fixed width where it is no terminal."""
    from rich.console import Console  # noqa: PLC0415

    out = opt.stdout()
    return Console(file=out) if out.isatty() else Console(file=out, width=PIPED_WIDTH, force_terminal=False)


def table(result: Result, former: Former | None, ratios: Mapping[str, Spread]) -> "Table":
    """A row for each figure: median, least and most, and the ratio to the former one."""
    from rich.table import Column, Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    columns = [Column(result.bench), Column("unit"), Column("median (min-max)", justify="right")]
    if former is not None:
        columns.append(Column("now / before", justify="right"))
    rows = Table(*columns, title=Text(printable(result.title)), title_justify="left")
    for key, spread in result.spreads.items():
        figure = result.figures[key]
        cells = [figure.label, figure.unit, str(spread)]
        if former is not None:
            cells.append(str(ratios[key]) if key in ratios else "-")
        rows.add_row(*cells)
    return rows


def remarks(result: Result, former: Former | None) -> Iterable[str]:
    """Lines below the table: the machine, what was left out and why, and what the ratios stand on."""
    yield describe(result.machine)
    if "cpu_kernels" in result.machine:
        yield f"CPU kernels: {result.machine['cpu_kernels']}"
    yield from result.notes
    for key, why in result.left_out.items():
        yield f"left out: {result.figures[key].label}: {why}"
    if former is None:
        return
    yield f"before: {former.file}: {_named(former.model)}"
    if machine := _other(former.machine, result.machine, ("cpu", "cores", "threads", "instructions", "system")):
        yield f"before, the machine was another one: {machine}"
    if settings := _other(former.settings, result.settings, sorted(result.settings.keys() - {"runs"})):
        yield f"before, the settings were others: {settings}"


def _named(model: Mapping[str, Any]) -> str:
    words = [f"{model[key]}" for key in ("dtype", "kernel", "stored_as") if model.get(key)]
    return f"{model.get('name')}" + (f": {', '.join(words)}" if words else "")


def _other(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> str:
    """What was otherwise before, in words; empty: nothing."""
    return ", ".join(f"{key} {before.get(key)}" for key in keys if key in now and before.get(key) != now[key])


def _is_measure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _short(value: float) -> float:
    """Four decimals at most: no figure is truer."""
    return round(value, 4)
