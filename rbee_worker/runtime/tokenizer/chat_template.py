"""Chat templates: they turn messages into prompt text, as in Hugging Face's transformers.

Templates come with the model and are not trusted. They run in jinja2's immutable sandbox, for a limited time, and see
only the values passed in. A failure in a template is an error of the request, not of the worker.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType, MappingProxyType
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rbee_worker.config import Message
from rbee_worker.errors import InvalidRequest, ModelMalformed, sentence
from rbee_worker.escape import one_line

_SECONDS = 5.0
"""How long a template may run. Usual templates take milliseconds."""

_LONGEST_REPEAT = 2**20
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, in which multiplication and powers cannot make very large values."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and not (numbers and abs(left) < _LONGEST_REPEAT and abs(right) <= 64):  # noqa: PLR2004
            raise SecurityError("a power out of bounds")
        times = [value for value in (left, right) if isinstance(value, int)]
        if not numbers and any(value > _LONGEST_REPEAT for value in times):
            raise SecurityError("a repetition out of bounds")
        return super().call_binop(context, operator, left, right)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError from code inside that runs for longer. It works because templates compile to Python."""
    ends, before = time.monotonic() + seconds, sys.gettrace()

    def trace(_frame: FrameType, _event: str, _argument: object) -> Any:
        if time.monotonic() > ends:
            raise TimeoutError
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's text for training. A prompt only needs its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """A model's compiled chat template, and its further ones.

    Args:
        source: text of the default template.
        special_tokens: ``bos_token`` and the like -> text of the token. The template sees them as variables.
        named: further templates by name. ``tool_use`` renders conversations with tools, ``rag`` those with documents;
            others are ignored.
        now: the clock for ``strftime_now``.

    Attributes:
        source: as given.
        constants: all strings that stand as constants in the templates, such as those that they look for in messages.

    Raises:
        ModelMalformed: a template cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        named: Mapping[str, str] = MappingProxyType({}),
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment: Environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, LoopControlExtension]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self.source = source
        self._special_tokens = dict(special_tokens)
        chosen = {name: named[name] for name in ("tool_use", "rag") if name in named}
        try:
            self._template = environment.from_string(source)
            self._named = {name: environment.from_string(text) for name, text in chosen.items()}
            values = [node.value for text in (source, *chosen.values()) for node in _constants(environment, text)]
        except (TemplateError, RecursionError) as error:
            raise ModelMalformed(
                f"The model's chat template cannot be compiled: {sentence(one_line(str(error)))}"
            ) from error
        self.constants = frozenset(value for value in values if isinstance(value, str))

    def render(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """The prompt that asks for the assistant's next message.

        Args:
            messages: the conversation so far.
            variables: further values for the template, such as ``tools`` (JSON schemas) and ``documents``. One with
                the name ``messages`` is ignored.

        Raises:
            InvalidRequest: the template refuses these messages, fails on them, or takes too long.
        """
        values: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": True}
        values |= {**self._special_tokens, **variables, "messages": [_with_reasoning(message) for message in messages]}
        try:
            with _deadline(_SECONDS):
                return self._choose(values).render(**values)
        except _Refusal as refusal:
            raise InvalidRequest(
                f"The model's chat template refuses these messages{_reason(refusal, messages)}."
            ) from None
        except Exception as error:
            # A template can raise anything. The text may quote a message, so the answer names only the type.
            raise InvalidRequest(
                f"The model's chat template fails on these messages: {type(error).__name__}."
            ) from error

    def _choose(self, values: Mapping[str, Any]) -> Template:
        """The template for these values, chosen as in transformers; ``rag`` for documents, as in Cohere's code."""
        if values["tools"] is not None and "tool_use" in self._named:
            return self._named["tool_use"]
        if values["documents"] is not None and "rag" in self._named:
            return self._named["rag"]
        return self._template


def _constants(environment: Environment, source: str) -> Iterator[nodes.Const]:
    return environment.parse(source).find_all(nodes.Const)


def _with_reasoning(message: Message) -> dict[str, Any]:
    """The message, with its reasoning also under ``thinking``, the name that gpt-oss's template reads."""
    reasoning = message.get("reasoning_content")
    return dict(message) if reasoning is None else {"thinking": reasoning, **message}


def _reason(refusal: Exception, messages: Sequence[Message]) -> str:
    """The text of the refusal; empty where it may quote a message, because errors do not repeat prompts."""
    text = str(refusal).strip().rstrip(".")
    parts = [part for message in messages for part in message.values() if part not in _ROLES]
    quoted = any(part and str(part) in text for part in parts)
    return "" if quoted or not text else f": {one_line(text)}"


class _Refusal(TemplateError):
    """The template called ``raise_exception``."""


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes for HTML, which would change a prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
