"""What differs from run to run, put as its type: names, order and types stay, values that must not change stay too."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIES = {
    # clocks
    "created", "created_at", "completed_at", "elapsed_ms", "elapsed_seconds", "eta_seconds", "started_at",
    "uptime_seconds", "decode_time_ms", "prefill_time_ms", "tokens_per_second", "bytes_per_second", "speed_mbps",
    "downloading", "resolving", "loading_to_vram", "warming_up",
    # the machine
    "description", "storage", "kernel", "cpu_kernels", "cpu", "total_bytes", "used_bytes", "free_bytes", "vram_bytes",
    "vram_mb", "vram_mb_freed", "vram_bytes_freed", "vram_total_mb",
    "kv_cache_tokens", "kv_cache_mb", "peak_host_mb",
    # how far something has come, how text is cut, how likely it is
    "seq", "tokens_out", "t", "i", "delta", "sequence_number", "cached", "cached_tokens", "logprob",
    # the release
    "version",
}  # fmt: skip
"""Keys whose values, where they are no objects or arrays, are put as their types."""

SENTENCES = {"message", "reason", "hint"}
"""Keys of words for people, which may be put better at any time; a value without a space is a word for programs."""

LIKELIEST = "top"
"""Holds the likeliest tokens, whatever those of a random model are."""

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_HEX = re.compile(r"[0-9a-f]{24,}")


def plain(value: Any, folder: Path, key: str = "") -> Any:
    """``value`` from JSON with types for what varies; ``folder`` is where this run's models lie."""
    if isinstance(value, dict):
        return {name: plain(item, folder, key if key == LIKELIEST else name) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item, folder, key) for item in value]
    if value is not None and _varies(key, value):
        return f"<{type(value).__name__}>"
    return masked(value, folder) if isinstance(value, str) else value


def _varies(key: str, value: Any) -> bool:
    if key in SENTENCES:
        return " " in str(value)
    measured = isinstance(value, float) and not value.is_integer()
    return measured or key == LIKELIEST or key in VARIES


def masked(text: str, folder: Path) -> str:
    """``text`` without this run's folder and identifiers."""
    return _HEX.sub("<hex>", _UUID.sub("<uuid>", text.replace(str(folder), "<folder>")))


def pretty(value: Any) -> str:
    """JSON that a reviewer can read, keys in the order they came."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def line(value: Any) -> str:
    """JSON on one line."""
    return json.dumps(value, ensure_ascii=False)


def once(lines: list[str]) -> Iterator[str]:
    """Lines that repeat the one before are left out: how many there are is a matter of timing."""
    yield from (text for before, text in zip(["", *lines], lines, strict=False) if text != before)


def transcript(events: list[dict[str, Any]], folder: Path) -> str:
    """Events, one a line; of counts that follow each other only the last, which has every field."""
    nexts = [event.get("stage") for event in events[1:]] + [None]
    counts = {"loading_to_vram", "downloading"}
    kept = [
        event
        for event, following in zip(events, nexts, strict=True)
        if event.get("stage") != following or following not in counts
    ]
    return "".join(f"{text}\n" for text in once([line(plain(event, folder)) for event in kept]))
