"""Compiles grammars with llguidance, within limits. Imports little, so that the process of ``trial`` starts fast."""

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
"""Limit of the work to build the lexer, in llguidance's units."""
_STEP_LEXER_FUEL = 200_000
"""Limit of the lexer's work for one mask: about 15 ms."""
_STEP_ITEMS = 20_000
"""Limit of the parser's work for one mask: about 15 ms."""
_ROW_ITEMS = 1_000
_LEXER_STATES = 50_000
"""Limit of the states of 1 to 2 kB each, which are made while the text grows."""
_GRAMMAR_SIZE = 25_000
"""Limit of the symbols. A schema of plain properties in 64 KiB has fewer."""

STACK_BYTES = 128 * 2**20
"""Stack of the thread that compiles. A grammar of 64 KiB whose rules name each other in a chain takes a quarter."""

_COMPLETE = frozenset({"NoExtension", "EndOfSentence"})
_EXACT = 2**53
_NOTHING = "no text that the model could write matches it"
_SHOWN = 300
_FRAME = re.compile(r"^\s*(\d+ \|.*|\^)$", re.MULTILINE)
"""Lines of a message that show where in the grammar an error is."""

_STACK_SIZE = threading.Lock()
"""Guards :func:`threading.stack_size`, which is a setting of the whole process."""


class Refused(Exception):
    """A grammar cannot be followed; the message says why."""


def source(spec: GrammarSpec) -> str:
    """A grammar in llguidance's own JSON format.

    Raises:
        Refused: the text is not a JSON schema, or not a regular expression.
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
    """Make llguidance's form of a tokenizer. It takes a second for a large one.

    Args:
        text: the content of ``tokenizer.json``.
        vocab_size: how many ids there are, those without a token included.
        eos_ids: ids that end the text; at least one.

    Raises:
        Refused: llguidance cannot tell the bytes of the tokenizer's tokens.
    """
    from llguidance import LLTokenizer  # noqa: PLC0415 - optional

    try:
        return _refusing(lambda: LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_ids))
    except Refused as refused:
        raise Refused(f"the model's tokenizer cannot be followed ({refused})") from refused


def build(tokenizer: "LLTokenizer", text: str) -> "LLMatcher":
    """Compile a grammar that :func:`source` made. Call it on the thread of :func:`large_stack`.

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
        Refused: the mask takes more work than is allowed, or no token can come first.
    """
    _refusing(matcher.compute_bitmask)
    if problem := trouble(matcher):
        raise Refused(problem)


def trouble(matcher: "LLMatcher") -> str:
    """Why a matcher cannot go on. Empty: it can go on, or its text is complete."""
    if matcher.is_error():
        error = matcher.get_error()
        return _NOTHING if error.startswith("NoExtensionBias") else reason(error)
    if matcher.is_stopped() and matcher.stop_reason() not in _COMPLETE:
        return _NOTHING
    return ""


def reason(error: str) -> str:
    """An error of llguidance in one line, without the lines that show the grammar."""
    text = _FRAME.sub("", error.partition("<backtrace>")[0].replace("<non-verbose/>", ""))
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def large_stack() -> ThreadPoolExecutor:
    """A pool of one thread. Its stack is large enough for the recursion of every grammar of allowed size."""
    with _STACK_SIZE:
        before = threading.stack_size(STACK_BYTES)
        try:
            pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
            pool.submit(int).result()  # starts the thread
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
    """An integer in ``enum`` or ``const`` that llguidance would change, because it makes it a float."""
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
