"""Checks the events of one load or of one job: their order and their figures. It sees JSON objects and nothing else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]

TERMINAL_STAGES = frozenset({"ready", "error", "cancelled"})
TERMINAL_EVENTS = frozenset({"end", "error"})

_STAGES = ("resolving", "downloading", "loading_to_vram", "warming_up")
_EVENTS = ("started", "prompt_progress", "prompt_logprobs", "token")
_COUNTS = {"layers_loaded": "layers_total", "bytes_loaded": "bytes_total", "bytes_downloaded": "bytes_total"}
"""What never falls, and what it never exceeds."""
_TOLD = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        check: its name.
        ok: whether all was as it should be; None: nothing came that could be looked at.
        detail: what was seen, or what is wrong.
    """

    check: str
    ok: bool | None
    detail: str


class Faults:
    """Collects what is wrong, by check."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, check: str, what: str) -> None:
        """Note a fault."""
        self._found.setdefault(check, []).append(what)

    def finding(self, check: str, seen: str, *, looked: bool = True) -> Finding:
        """The finding of a check: its faults, else ``seen``. ``looked``: whether there was anything to look at."""
        found = self._found.get(check)
        if not found:
            return Finding(check, ok=True if looked else None, detail=seen)
        more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
        return Finding(check, ok=False, detail="; ".join(found[:_TOLD]) + more)


def is_terminal(event: Event) -> bool:
    """Whether no event may follow."""
    if "stage" in event:
        return event["stage"] in TERMINAL_STAGES if isinstance(event["stage"], str) else False
    return isinstance(event.get("event"), str) and event["event"] in TERMINAL_EVENTS


class EventOrder:
    """Takes the events of one load or of one job as they come.

    Stages, events and fields that it does not know are passed over.

    Args:
        gaps: whether events may be missing: the subscriber reads slowly.

    Attributes:
        events: those taken.
    """

    def __init__(self, *, gaps: bool = False) -> None:
        self.events: list[Event] = []
        self._gaps = gaps
        self._faults = Faults()
        self._rank = 0
        self._counts: dict[tuple[str, str], float] = {}
        self._layers: dict[str, tuple[Any, Any]] = {}  # device -> loaded, total
        self._tokens = 0

    def take(self, event: Event) -> None:
        """Look at the next event."""
        if self.events and is_terminal(self.events[-1]):
            self._faults.add("terminal", f"{_word(event)} came after {_word(self.events[-1])}")
        if "stage" in event:
            self._numbers(event)
            self._place(event, _STAGES)
            self._count(event)
        elif "event" in event:
            self._place(event, _EVENTS)
            if event["event"] == "token":
                if event.get("i") != self._tokens:
                    self._faults.add("i", f"{event.get('i')!r} where {self._tokens} was due")
                self._tokens += 1
        else:
            self._faults.add("events", f"event {len(self.events) + 1} has neither `stage` nor `event`")
        self.events.append(event)

    @property
    def ended(self) -> bool:
        """Whether the terminal event has come."""
        return any(map(is_terminal, self.events))

    def findings(self) -> list[Finding]:
        """What was found, once the stream has ended."""
        told, faults = self.events, self._faults
        terminals = [_word(event) for event in told if is_terminal(event)]
        if not terminals:
            faults.add("terminal", "none came")
        elif len(terminals) > 1:
            faults.add("terminal", f"{len(terminals)} came: {', '.join(terminals)}")
        words = list(dict.fromkeys(_word(event) for event in told))
        found = [
            faults.finding("events", f"{len(told)} events", looked=bool(told)),
            faults.finding("order", ", ".join(words), looked=bool(told)),
            faults.finding("terminal", "one, the last: " + ", ".join(terminals)),
        ]
        if any("event" in event and "stage" not in event for event in told):
            return [*found, faults.finding("i", f"0 to {self._tokens - 1}", looked=self._tokens > 0)]
        numbers = [event.get("seq") for event in told]
        counted = ", ".join(f"{name} {loaded}/{total} layers" for name, (loaded, total) in self._layers.items())
        gapless = "" if self._gaps else ", without gaps after the snapshot"
        return [
            *found,
            faults.finding("seq", f"{numbers[0]} to {numbers[-1]}{gapless}" if told else "", looked=bool(told)),
            faults.finding("elapsed_seconds", "never falls", looked=bool(told)),
            faults.finding("counts", f"never fall; {counted}", looked=bool(self._layers)),
        ]

    def _numbers(self, event: Event) -> None:
        """``seq`` and ``elapsed_seconds``."""
        before: Event = self.events[-1] if self.events else {}
        seq: Any = event.get("seq")
        elapsed: Any = event.get("elapsed_seconds")
        last: Any = before.get("seq")
        earlier: Any = before.get("elapsed_seconds")
        if not _is_number(seq, int):
            self._faults.add("seq", f"{_word(event)} has none")
        elif _is_number(last, int):
            # A snapshot is the latest counts and then the latest event: between the two, others may have been.
            snapshot = len(self.events) == 1 and before.get("stage") == "loading_to_vram"
            if seq <= last or (seq != last + 1 and not (self._gaps or snapshot)):
                self._faults.add("seq", f"{seq} after {last}")
        if not _is_number(elapsed, int | float):
            self._faults.add("elapsed_seconds", f"{_word(event)} has none")
        elif _is_number(earlier, int | float) and elapsed < earlier:
            self._faults.add("elapsed_seconds", f"{elapsed} after {earlier}")

    def _place(self, event: Event, order: tuple[str, ...]) -> None:
        """Whether it may come here."""
        word = _word(event)
        if word in order:
            rank = order.index(word)
            if rank < self._rank:
                self._faults.add("order", f"{word} came after {order[self._rank]}")
            self._rank = max(self._rank, rank)
        if word == "ready" and not self._layers:
            self._faults.add("order", "ready came without a loading_to_vram before it")
        if order is _EVENTS and not self.events and word in _EVENTS[1:]:
            self._faults.add("order", f"{word} came first")

    def _count(self, event: Event) -> None:
        """Counts never fall, and reach what they count to."""
        word, device = _word(event), str(event.get("device", ""))
        for name, limit in _COUNTS.items():
            if name not in event:
                continue
            count, total = event[name], event.get(limit)
            if not _is_number(count, int) or not _is_number(total, int):
                self._faults.add("counts", f"{name} {count!r} of {total!r}")
                continue
            # Bytes are counted for all devices together, layers for each.
            before = self._counts.get((name, device), 0)
            if count < before:
                self._faults.add("counts", f"{name} fell from {before} to {count}")
            if count > total:
                self._faults.add("counts", f"{name} {count} is beyond {limit} {total}")
            self._counts[name, device] = count
        if word == "loading_to_vram":
            self._layers[device] = event.get("layers_loaded"), event.get("layers_total")
        if word in {"warming_up", "ready"} and self._layers and not self._all_layers():
            self._faults.add("counts", f"{word} came before all layers were counted")

    def _all_layers(self) -> bool:
        """Whether each device, or all together, have the model's layers."""
        pairs = [(loaded, total) for loaded, total in self._layers.values() if _is_number(loaded, int)]
        return all(loaded == total for loaded, total in pairs) or sum(pair[0] for pair in pairs) == pairs[0][1]


def findings_of(events: Iterable[Event], *, gaps: bool = False) -> list[Finding]:
    """What there is to find in all events of a load or of a job."""
    order = EventOrder(gaps=gaps)
    for event in events:
        order.take(event)
    return order.findings()


def faults_in(events: Iterable[Event], *, gaps: bool = False) -> list[str]:
    """What is wrong with all events of a load or of a job; empty: nothing."""
    return failures(findings_of(events, gaps=gaps))


def failures(findings: Iterable[Finding]) -> list[str]:
    """The checks that failed, with what is wrong."""
    return [f"{found.check}: {found.detail}" for found in findings if found.ok is False]


def _word(event: Event) -> str:
    return str(event.get("stage", event.get("event")))[:40]


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value >= 0
