"""Grammars over a tokenizer of single bytes: compilers, walks and refusals, for the suites of structured output."""

import random

import numpy as np
import pytest

from rbee_worker.config import GrammarKind, GrammarSpec
from rbee_worker.errors import InvalidRequest
from rbee_worker.runtime.grammar.compiler import GrammarCompiler, GrammarMatcher
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer
from tests.tiny import byte_tokenizer

VOCAB = 320
EOS = 256
OTHER_EOS = 300
BYTES = Tokenizer(byte_tokenizer(), eos_ids=frozenset({EOS, OTHER_EOS}))
CLOSING = BYTES.encode('"}]')


def numbers(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311  (no secret)


def allowed(matcher: GrammarMatcher) -> list[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def walk(matcher: GrammarMatcher, rng: random.Random, ends: tuple[int, ...] = (EOS, OTHER_EOS)) -> str:
    """A text by choosing among allowed tokens, closing what is open once it is long."""
    text: list[int] = []
    while True:
        choices = allowed(matcher)
        final = [token for token in choices if token in ends]
        if final and (len(final) == len(choices) or len(text) > 60 or rng.random() < 0.3):
            token = rng.choice(final)
            matcher.accept(token)
            assert matcher.finished
            return BYTES.decode(text)
        choices = [token for token in choices if token not in ends]
        closing = [token for token in CLOSING if token in choices] if len(text) > 60 else []
        token = rng.choice(closing or choices)
        text.append(token)
        matcher.accept(token)
        assert len(text) < 3000, "this never ends"


def matches(matcher: GrammarMatcher, text: str) -> bool:
    """Whether the masks let the text be written and ended."""
    for token in BYTES.encode(text) if text else []:
        if token not in allowed(matcher):
            return False
        matcher.accept(token)
    return EOS in allowed(matcher)


def refused(compiler: GrammarCompiler, kind: GrammarKind, text: str) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(GrammarSpec(kind, text))
    (field,) = caught.value.fields
    assert field.field == "grammar"
    assert len(caught.value.message) < 500
    return caught.value
