"""Errors in the words of HTTP: what a client can send, and else what the one who starts the worker can say."""

from collections.abc import Mapping
from typing import Final

from rbee_worker.errors import ModelNotLoaded, RbeeError, Setting, sentence

_HINTS: Final[Mapping[type[RbeeError], str]] = {
    ModelNotLoaded: "Load one with POST /v1/loading, or start the worker with --model.",
}
"""What to do about an error that says all by its class."""

_IN_REQUESTS: Final = frozenset({"device", "dtype", "quantize"})
"""Settings that the body of ``POST /v1/loading`` may have; the others are options of the worker."""


def in_words(error: RbeeError) -> str:
    """The message of an error, with what to do about it."""
    advice = _HINTS.get(type(error)) or error.advice(_setting)
    return f"{sentence(error.message)} {advice}" if advice else error.message


def _setting(name: Setting, value: str | int) -> str:
    return f'"{name}": "{value}"' if name in _IN_REQUESTS else f"--{name.replace('_', '-')} {value}"
