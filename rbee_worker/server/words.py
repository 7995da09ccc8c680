"""Puts errors into words for HTTP: with fields of requests, or with options of the worker."""

from collections.abc import Mapping
from typing import Final

from rbee_worker.errors import ModelNotLoaded, RbeeError, Setting, sentence

_HINTS: Final[Mapping[type[RbeeError], str]] = {
    ModelNotLoaded: "Load one with POST /v1/loading, or start the worker with --model.",
}
"""Class of an error -> what to do about it."""

_IN_REQUESTS: Final = frozenset({"device", "dtype", "quantize"})
"""Settings that are fields of ``POST /v1/loading``. All others are options of the worker."""


def in_words(error: RbeeError) -> str:
    """The message of an error, and what to do about it."""
    advice = _HINTS.get(type(error)) or error.advice(_setting)
    return f"{sentence(error.message)} {advice}" if advice else error.message


def _setting(name: Setting, value: str | int) -> str:
    return f'"{name}": "{value}"' if name in _IN_REQUESTS else f"--{name.replace('_', '-')} {value}"
