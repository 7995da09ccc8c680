"""Texts that follow a grammar's masks match it, whole; what cannot be followed is refused with the reason."""

import importlib.util
import itertools
import json
import re
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rbee_worker.config import MAX_GRAMMAR_BYTES, GrammarSpec
from rbee_worker.errors import InferenceError
from rbee_worker.runtime.grammar.compiler import GrammarCompiler
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer
from tests.tiny import byte_tokenizer
from tests.unit.runtime.grammar.case import BYTES, EOS, OTHER_EOS, VOCAB, allowed, matches, numbers, refused, walk

QUICK = settings(suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """For one token per byte; the two tokens that end a text are none of the tokenizer's."""
    return GrammarCompiler(BYTES, VOCAB)


leaves = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.just({"type": "number"}),
    st.tuples(st.integers(-1000, 1000), st.integers(0, 1000)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.integers(0, 5).map(lambda n: {"type": "string", "minLength": n, "maxLength": n + 3}),
    st.just({"type": "string", "pattern": "^[a-c]{2,4}$"}),
    st.lists(st.one_of(st.integers(-(2**53), 2**53), st.text(max_size=5), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(st.sampled_from(["a", "b", "a b", "é"]), inner, max_size=3)
    return properties.flatmap(
        lambda fields: st.sets(st.sampled_from([*fields, "a"])).map(
            lambda required: {
                "type": "object",
                "properties": fields,
                "required": sorted(required & fields.keys()),
                "additionalProperties": False,
            }
        )
    )


def compounds(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        objects(inner),
        st.tuples(inner, st.integers(0, 3)).map(
            lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 2}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several}),
    )


@given(schema=objects(st.recursive(leaves, compounds, max_leaves=6)), seed=st.integers(0, 2**32))
@QUICK
def test_every_text_that_follows_a_schema_is_json_that_validates(
    compiler: GrammarCompiler, schema: dict[str, Any], seed: int
):
    matcher = compiler.compile(GrammarSpec("json_schema", json.dumps(schema)))
    text = walk(matcher, numbers(seed))
    # 1e999 is JSON, and infinity to Python, which no schema knows.
    jsonschema_rs.validate(schema, json.loads(text, parse_float=lambda digits: max(-1e300, min(float(digits), 1e300))))


@pytest.mark.parametrize("seed", range(10))
def test_any_json_object(compiler: GrammarCompiler, seed: int):
    value = json.loads(walk(compiler.compile(GrammarSpec("json_object")), numbers(seed)))
    assert isinstance(value, dict)


@pytest.mark.parametrize("value", ['{"a": [1, {"b": null}], "c": "é\\n"}', '{"a":[1,2.5e3,-1]}', "{}"])
def test_json_as_models_write_it_is_allowed(compiler: GrammarCompiler, value: str):
    assert matches(compiler.compile(GrammarSpec("json_object")), value)


@pytest.mark.parametrize(
    "value", ["[1]", '"a"', "", "{", '{"a":1}}', ' {"a":1}', '{"a":}', '{"a":01}', '{"a":  1}', '{"a":\n1}']
)
def test_what_is_no_json_object_is_not_allowed(compiler: GrammarCompiler, value: str):
    assert not matches(compiler.compile(GrammarSpec("json_object")), value)


def test_white_space_cannot_go_on_for_ever(compiler: GrammarCompiler):
    matcher = compiler.compile(GrammarSpec("json_object"))
    for token in BYTES.encode('{"a": '):
        matcher.accept(token)
    assert not set(BYTES.encode(" \n\t\r")) & set(allowed(matcher))


PATTERNS = ["a*b", "(ab|c)+", "a{2,3}", "[^a]b?", "", "(a|b)*a(a|b)", "a(b(c)?)?", "(?i)AB"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regular_expression_allows_its_language_and_nothing_else(compiler: GrammarCompiler, pattern: str):
    spec = GrammarSpec("regex", pattern)
    for length in range(5):
        for letters in itertools.product("abc", repeat=length):
            text = "".join(letters)
            assert matches(compiler.compile(spec), text) == bool(re.fullmatch(pattern, text)), text


@pytest.mark.parametrize("pattern", [r"\d{4}-\d\d", r"[a-f0-9]{8}|none", r"(é|ü|€){1,3}", r"a/b\\c\"d"])
def test_texts_that_follow_a_regular_expression_match_it(compiler: GrammarCompiler, pattern: str):
    for seed in range(5):
        text = walk(compiler.compile(GrammarSpec("regex", pattern)), numbers(seed))
        assert re.fullmatch(pattern, text), text


def test_a_lark_grammar(compiler: GrammarCompiler):
    spec = GrammarSpec("lark", 'start: list\nlist: "(" (list | NUMBER)* ")"\nNUMBER: /[0-9]+;/')
    assert matches(compiler.compile(spec), "(1;(2;)())")
    assert not matches(compiler.compile(spec), "(1;(2;)")
    assert not matches(compiler.compile(spec), "((1)")
    for seed in range(5):
        text = walk(compiler.compile(spec), numbers(seed))
        assert text.count("(") == text.count(")")


def test_the_end_is_allowed_when_the_text_may_end_and_only_then(compiler: GrammarCompiler):
    matcher = compiler.compile(GrammarSpec("regex", "ab?"))
    (a,), (b,) = BYTES.encode("a"), BYTES.encode("b")
    assert allowed(matcher) == [a]
    matcher.accept(a)
    assert sorted(allowed(matcher)) == sorted([b, EOS, OTHER_EOS])
    assert not matcher.finished
    matcher.accept(b)
    assert allowed(matcher) == [EOS, OTHER_EOS]
    assert matcher.finished
    with pytest.raises(InferenceError, match="complete"):
        matcher.accept(a)


def test_a_token_that_is_not_allowed_is_an_error(compiler: GrammarCompiler):
    matcher = compiler.compile(GrammarSpec("regex", "ab?"))
    with pytest.raises(InferenceError):
        matcher.accept(BYTES.encode("b")[0])
    with pytest.raises(InferenceError):
        compiler.compile(GrammarSpec("regex", "ab?")).accept(EOS)


def test_an_end_token_of_the_tokenizer_itself():
    backend = byte_tokenizer()
    backend.add_special_tokens(["<|im_end|>", "<|other|>"])
    special = Tokenizer(backend, eos_ids=frozenset({256}))
    matcher = GrammarCompiler(special, 258).compile(GrammarSpec("regex", "(?s:.)*"))
    first = allowed(matcher)
    assert 256 in first
    assert 257 not in first, "a special token is no text"
    assert len(walk(matcher, numbers(0), (256,))) > 0


def test_a_model_without_an_end_token_is_told_by_finished():
    matcher = GrammarCompiler(Tokenizer(byte_tokenizer(), eos_ids=frozenset()), VOCAB).compile(
        GrammarSpec("regex", "ab?")
    )
    (a,), (b,) = BYTES.encode("a"), BYTES.encode("b")
    matcher.accept(a)
    assert allowed(matcher) == [b]
    matcher.accept(b)
    assert matcher.finished
    assert allowed(matcher) == []


@pytest.mark.parametrize("vocab_size", [256, 257, 288, 70])
def test_the_mask_is_as_wide_as_the_logits(vocab_size: int):
    matcher = GrammarCompiler(BYTES, vocab_size).compile(GrammarSpec("regex", "(?s:.*)"))
    assert matcher.mask().shape == (-(-vocab_size // 32),)
    assert matcher.mask().dtype == np.int32
    assert max(allowed(matcher)) < vocab_size


def test_a_grammar_of_tokens_that_the_model_lacks():
    assert BYTES.encode("\n")[0] > 128
    matcher = GrammarCompiler(BYTES, 128).compile(GrammarSpec("regex", "\\n"))
    with pytest.raises(InferenceError, match="No token"):
        matcher.mask()


IMPOSSIBLE = {
    "not JSON": ("json_schema", '{"a":', "not JSON"),
    "no object": ("json_schema", "[]", "object"),
    "a number that JSON lacks": ("json_schema", '{"minimum":NaN}', "NaN is no number in JSON"),
    "options that are none": ("json_schema", '{"x-guidance":1}', "x-guidance must be an object"),
    "false": ("json_schema", "false", "nothing"),
    "minimum above maximum": ("json_schema", '{"type":"integer","minimum":5,"maximum":3}', "Unsatisfiable"),
    "required but impossible": (
        "json_schema",
        '{"type":"object","properties":{"a":{"enum":[]}},"required":["a"]}',
        "nsatisfiable",
    ),
    "itself": ("json_schema", '{"$ref":"#"}', "no text"),
    "unsupported keyword": ("json_schema", '{"not":{"type":"string"}}', "not"),
    "an integer that would be rounded": ("json_schema", '{"items":{"enum":[1,9007199254740993]}}', "9007199254740993"),
    "file": ("json_schema", '{"$ref":"file:///etc/passwd"}', "passwd"),
    "look-ahead": ("regex", "(?=a)b", "look-ahead"),
    "unclosed": ("regex", "(a", "regex"),
    "no start": ("lark", "begin: /a/", "start"),
    "import": ("lark", "%import /etc/passwd\nstart: /a/", "Expected"),
    "half a surrogate pair": ("regex", "\ud800", "Unicode"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_followed_is_refused_with_the_reason(compiler: GrammarCompiler, case: str):
    kind, text, reason = IMPOSSIBLE[case]
    assert reason in refused(compiler, kind, text).message


def test_true_is_any_json(compiler: GrammarCompiler):
    assert matches(compiler.compile(GrammarSpec("json_schema", "true")), "[1, null]")


def test_verdicts_are_kept_for_the_latest_grammars(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch):
    tried: list[str] = []
    real = compiler._trial.refusal
    monkeypatch.setattr(compiler._trial, "refusal", lambda text: tried.append(text) or real(text))
    monkeypatch.setattr("rbee_worker.runtime.grammar.compiler._VERDICTS", 2)
    compiler._verdicts.clear()
    for letter in "xyxzxy":
        compiler.compile(GrammarSpec("regex", letter))
    assert len(compiler._verdicts) == 2
    assert len(tried) == 4  # x, y, z, and y again: x was asked for between


def test_size_is_checked_before_anything_else():
    untouched = GrammarCompiler(BYTES, VOCAB)
    message = refused(untouched, "regex", "é" * (MAX_GRAMMAR_BYTES // 2 + 1)).message
    assert str(MAX_GRAMMAR_BYTES + 2) in message
    assert untouched._vocabulary is None


def test_a_schema_may_not_change_the_white_space(compiler: GrammarCompiler):
    schema = '{"type":"object","x-guidance":{"whitespace_flexible":true,"whitespace_pattern":"X*","key_separator":";"}}'
    assert matches(compiler.compile(GrammarSpec("json_schema", schema)), '{"a": 1}')
    assert not matches(compiler.compile(GrammarSpec("json_schema", schema)), '{"a"; 1}')
    assert not matches(compiler.compile(GrammarSpec("json_schema", schema)), '{XX"a":1}')


def test_texts_of_one_grammar_do_not_share_their_place(compiler: GrammarCompiler):
    spec = GrammarSpec("regex", "ab")
    first, second = compiler.compile(spec), compiler.compile(spec)
    first.accept(BYTES.encode("a")[0])
    assert allowed(second) == BYTES.encode("a")


def test_without_llguidance_the_way_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llguidance" else find(name))
    assert "pip install '.[grammar]'" in str(refused(GrammarCompiler(BYTES, VOCAB), "json_object", ""))


def test_a_tokenizer_without_bytes_is_refused():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))  # noqa: S106
    message = refused(GrammarCompiler(Tokenizer(words, eos_ids=frozenset()), 2), "regex", "a").message
    assert "tokenizer" in message


def test_pieces_of_sentencepiece_are_read_as_their_bytes():
    """A space is U+2581 in them, and a byte ``<0x0A>``."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581a", "a", "b"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [],
            unk_token="<unk>",  # noqa: S106
            byte_fallback=True,
        )
    )
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "</s>"])
    ids = {piece: index for index, piece in enumerate(pieces)}
    matcher = GrammarCompiler(Tokenizer(backend, eos_ids=frozenset({1})), len(pieces)).compile(
        GrammarSpec("regex", "b? a\\n")
    )
    assert {ids["b"], ids["\u2581"], ids["\u2581a"]} < set(allowed(matcher))
    assert not {ids["a"], ids["</s>"], ids["<unk>"]} & set(allowed(matcher))
    matcher.accept(ids["\u2581a"])
    assert allowed(matcher) == [ids["<0x0A>"]]
    matcher.accept(ids["<0x0A>"])
    assert allowed(matcher) == [ids["</s>"]]
