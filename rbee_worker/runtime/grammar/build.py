"""Grammars compiled by llguidance, within limits. Imports little: a process that tries grammars out starts with it."""

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from rbee_worker.config import JSON_LAYOUT, GrammarSpec
from rbee_worker.panics import panics_as_errors

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")

_LEXER_FUEL = 500_000
"""Work to build the lexer."""
_STEP_LEXER_FUEL = 200_000
"""The lexer's work for one mask: some 15 ms."""
_STEP_ITEMS = 20_000
"""The parser's work for one mask: some 15 ms."""
_ROW_ITEMS = 1_000
_LEXER_STATES = 50_000
"""Of 1 to 2 kB each, made as the text goes on."""
_GRAMMAR_SIZE = 25_000
"""Symbols: more than plain properties in 64 KiB make."""

STACK_BYTES = 128 * 2**20
"""Of the thread that compiles: rules that name each other in a chain of 64 KiB take a quarter of it."""

_COMPLETE = frozenset({"NoExtension", "EndOfSentence"})
_EXACT = 2**53
_NOTHING = "no text that the model could write matches it"
_SHOWN = 300
_FRAME = re.compile(r"^\s*(\d+ \|.*|\^)$", re.MULTILINE)
"""Lines that show where in the grammar an error is."""

_STACK_SIZE = threading.Lock()
"""Guards :func:`threading.stack_size`, a setting of the process."""


class Refused(Exception):
    """A grammar that cannot be followed, and why."""


def source(spec: GrammarSpec) -> str:
    """A grammar as llguidance takes it.

    Raises:
        Refused: a JSON schema that is not JSON, or no schema.
    """
    if spec.kind == "regex":
        from llguidance import LLMatcher  # noqa: PLC0415 - optional

        return _refusing(lambda: LLMatcher.grammar_from_regex(spec.text))
    if spec.kind == "lark":
        return json.dumps({"grammars": [{"lark_grammar": spec.text}]})
    schema = {"type": "object"} if spec.kind == "json_object" else _schema(spec.text)
    options: Any = schema.get("x-guidance", {})
    if not isinstance(options, dict):
        raise Refused("x-guidance must be an object")
    return json.dumps({"grammars": [{"json_schema": schema | {"x-guidance": options | dict(JSON_LAYOUT)}}]})


def load_tokenizer(text: str, vocab_size: int, eos_ids: list[int]) -> "LLTokenizer":
    """What llguidance makes of a tokenizer; it takes a second for a large one.

    Args:
        text: ``tokenizer.json``.
        vocab_size: ids, those without a token included.
        eos_ids: ids that end the text, at least one.

    Raises:
        Refused: it cannot tell the bytes of this tokenizer's tokens.
    """
    from llguidance import LLTokenizer  # noqa: PLC0415 - optional

    try:
        return _refusing(lambda: LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_ids))
    except Refused as refused:
        raise Refused(f"the model's tokenizer cannot be followed ({refused})") from refused


def build(tokenizer: "LLTokenizer", text: str) -> "LLMatcher":
    """Compile :func:`source`'s text; to be called on a large stack.

    Raises:
        Refused: the grammar is malformed, unsupported or too complex.
    """
    from llguidance import LLMatcher, LLParserLimits  # noqa: PLC0415 - optional

    limits = LLParserLimits(
        initial_lexer_fuel=_LEXER_FUEL,
        step_lexer_fuel=_STEP_LEXER_FUEL,
        step_max_items=_STEP_ITEMS,
        max_items_in_row=_ROW_ITEMS,
        max_lexer_states=_LEXER_STATES,
        max_grammar_size=_GRAMMAR_SIZE,
        verbose_errors=False,
    )
    matcher = _refusing(lambda: LLMatcher(tokenizer, text, log_level=0, limits=limits))
    if problem := trouble(matcher):
        raise Refused(problem)
    return matcher


def try_first_mask(matcher: "LLMatcher") -> None:
    """Compute the first mask.

    Raises:
        Refused: it takes more than is allowed, or there is no token to begin with.
    """
    _refusing(matcher.compute_bitmask)
    if problem := trouble(matcher):
        raise Refused(problem)


def trouble(matcher: "LLMatcher") -> str:
    """Why a matcher cannot go on, though its text is not complete; empty: it can, or it is."""
    if matcher.is_error():
        error = matcher.get_error()
        return _NOTHING if error.startswith("NoExtensionBias") else reason(error)
    if matcher.is_stopped() and matcher.stop_reason() not in _COMPLETE:
        return _NOTHING
    return ""


def reason(error: str) -> str:
    """An error of llguidance in one line, without the grammar's text around it."""
    text = _FRAME.sub("", error.partition("<backtrace>")[0].replace("<non-verbose/>", ""))
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def large_stack() -> ThreadPoolExecutor:
    """A thread whose stack holds any recursion that a grammar of the largest size can cause."""
    with _STACK_SIZE:
        before = threading.stack_size(STACK_BYTES)
        try:
            pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
            pool.submit(int).result()  # that starts the thread
        finally:
            threading.stack_size(before)
    return pool


def _refusing(function: Callable[[], T]) -> T:
    try:
        with panics_as_errors():
            return function()
    except MemoryError:
        raise
    except Exception as error:  # llguidance reports by ValueError, or panics
        raise Refused(reason(str(error))) from error


def _schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise Refused("it is nested too deeply") from None
    except ValueError as error:
        raise Refused(f"it is not JSON: {error}") from None
    if schema is True:
        return {}
    if schema is False:
        raise Refused("nothing matches false")
    if not isinstance(schema, dict):
        raise Refused("it must be a JSON object")
    if (number := _inexact(schema)) is not None:
        raise Refused(f"enum and const cannot hold {number}: integers are exact up to 2^53")
    return schema


def _inexact(schema: dict[str, Any]) -> int | None:
    """An integer that ``enum`` or ``const`` asks for and llguidance, which has only floats for it, would change."""
    values: list[tuple[Any, bool]] = [(schema, False)]
    while values:
        value, exact = values.pop()
        if isinstance(value, dict):
            values += [(inner, exact or key in ("enum", "const")) for key, inner in value.items()]
        elif isinstance(value, list):
            values += [(inner, exact) for inner in value]
        elif exact and isinstance(value, int) and abs(value) > _EXACT:
            return value
    return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")
