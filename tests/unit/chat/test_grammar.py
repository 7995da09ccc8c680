"""Forced calls: whatever a model picks among the tokens that the grammar allows, the parser reads as calls."""

import itertools
import json
import random

import jsonschema_rs
import llguidance
import pytest
from tokenizers import AddedToken

from rbee_worker.chat.grammar import MAX_PARALLEL_CALLS
from rbee_worker.chat.output import ChatFormat
from rbee_worker.config import MAX_GRAMMAR_BYTES
from rbee_worker.errors import InvalidRequest
from tests.tiny import byte_tokenizer
from tests.unit.chat import templates as t

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", 'it\'s "F"\n']},
        "hours": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "at": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "days"],
    "$defs": {
        "place": {"type": "object", "properties": {"x": {"const": 1.5}}, "required": ["x"]},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get-time"}},
    {"type": "function", "function": {"name": "get_time_2", "parameters": {"type": "object", "properties": {}}}},
]
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {"maxProperties": 0}) for tool in TOOLS}
MARKERS = ("<tool_call>", "</tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", "[/THINK]")
STYLES = {
    "hermes": t.QWEN3,
    "unknown": None,
    "granite": t.GRANITE_3,
    "llama3": t.LLAMA_31,
    "mistral": t.MISTRAL,
    "named": t.MAGISTRAL,
}


class Model:
    """A model that picks any allowed token; ``special``: whether the markers are special tokens, None: no tokens."""

    def __init__(self, special: bool | None) -> None:
        backend = byte_tokenizer()
        if special is not None:
            backend.add_tokens([AddedToken(marker, special=special) for marker in MARKERS])
        backend.add_special_tokens([AddedToken("<eos>", special=True)])
        self.eos = backend.token_to_id("<eos>")
        self.added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        self._tokenizer = llguidance.LLTokenizer(backend.to_str(), eos_token=self.eos)
        self._markers = {index: text.encode() for text, index in self.added.items()}
        self._bytes = [
            self._markers.get(index) or self._tokenizer.decode_bytes([index]) for index in range(self.eos + 1)
        ]

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def write(self, grammar: str, rng: random.Random, *, begin: tuple[str, ...] = ()) -> str:
        """A text that the grammar allows; ``begin``: tokens or text that it starts with."""
        matcher, written = self.matcher(grammar), []
        first = [token for part in begin for token in self.tokens(part)]
        for _ in range(4000):
            token = first.pop(0) if first else self._pick(matcher, rng)
            assert matcher.consume_token(token), matcher.get_error()
            if token != self.eos:
                written.append(self._bytes[token])
            if token == self.eos or (matcher.is_stopped() and not first):
                return b"".join(written).decode()
        raise AssertionError(f"no end to {b''.join(written)!r}")

    def tokens(self, part: str) -> list[int]:
        """One token for a marker that is one, else its bytes."""
        if part in self.added:
            return [self.added[part]]
        return [self._bytes.index(bytes([byte])) for byte in part.encode()]

    def accepts(self, grammar: str, tokens: list[int]) -> bool:
        matcher = self.matcher(grammar)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def _pick(self, matcher: llguidance.LLMatcher, rng: random.Random) -> int:
        mask = matcher.compute_bitmask()
        allowed = [index for index in range(self.eos + 1) if mask[index // 8] >> index % 8 & 1]
        return self.eos if self.eos in allowed and rng.random() < 0.4 else rng.choice(allowed)


@pytest.fixture(scope="module", params=[None, False, True], ids=["spelled", "added", "special"])
def model(request) -> Model:
    return Model(request.param)


def dice(seed: str) -> random.Random:
    return random.Random(seed)  # noqa: S311  (nothing secret)


def calls(template: str | None, text: str, prompt: str = "") -> tuple[str, list[tuple[str, object]]]:
    """The reasoning and the calls of an answer that has nothing else."""
    reasoning, content, found = t.assembled(t.parse(template, [text], prompt=prompt, names=SCHEMAS))
    assert content == "", text
    return reasoning, [(name, json.loads(arguments)) for name, arguments in found]


def check(found: list[tuple[str, object]]) -> None:
    assert found
    for name, arguments in found:
        assert isinstance(arguments, dict)
        jsonschema_rs.validate(SCHEMAS[name], arguments)


@pytest.mark.parametrize("style", STYLES)
def test_any_walk_is_calls_that_fit_their_schemas(model, style):
    chat, rng = ChatFormat.detect(STYLES[style], added_tokens=model.added), dice(style)
    seen: set[str] = set()
    counts: set[int] = set()
    for parallel, _ in itertools.product((False, True), range(12)):
        grammar = chat.tool_grammar(TOOLS, "required", parallel).text
        _, found = calls(STYLES[style], model.write(grammar, rng))
        check(found)
        assert len(found) == 1 or parallel
        assert len(found) <= MAX_PARALLEL_CALLS
        seen |= {name for name, _ in found}
        counts.add(len(found))
    assert seen == SCHEMAS.keys()
    assert len(counts) > 1


@pytest.mark.parametrize("style", STYLES)
def test_a_named_tool_is_the_one_that_is_called(model, style):
    chat, rng = ChatFormat.detect(STYLES[style], added_tokens=model.added), dice(style)
    grammar = chat.tool_grammar(TOOLS, "get-time", parallel=True).text
    _, found = calls(STYLES[style], model.write(grammar, rng))
    assert set(map(repr, found)) == {"('get-time', {})"}


THOUGHTS = [(t.QWEN3_THINKING, "<think>\n", "</think>"), (t.MAGISTRAL, "[THINK]", "[/THINK]")]


@pytest.mark.parametrize("closes", ["", "\n", "\n\n"])
@pytest.mark.parametrize(("template", "prompt", "marker"), THOUGHTS)
def test_where_the_prompt_begins_the_reasoning_calls_follow_behind_it(model, template, prompt, marker, closes):
    chat, rng = ChatFormat.detect(template, added_tokens=model.added), dice(marker)
    grammar = chat.tool_grammar(TOOLS, "required", parallel=True, prompt_text=prompt).text
    text = model.write(grammar, rng, begin=("Hm </thi <tool_call> é\n", marker, closes))
    reasoning, found = calls(template, text, prompt)
    check(found)
    assert reasoning == "Hm </thi <tool_call> é"


@pytest.mark.parametrize(("template", "marker"), [(template, marker) for template, _, marker in THOUGHTS])
def test_where_the_prompt_does_not_there_is_no_reasoning(model, template, marker):
    chat = ChatFormat.detect(template, added_tokens=model.added)
    prompt = "<think>\n\n</think>\n\n"
    grammar = chat.tool_grammar(TOOLS, "required", parallel=True, prompt_text=prompt).text
    for text in ("Hm", marker):
        tokens = model.tokens(text)
        assert model.matcher(grammar).try_consume_tokens(tokens) < len(tokens)


HERMES_CALL = ("<tool_call>", '\n{"name": "get_weather", "arguments": {"city":"Rom", "days": 2}}\n', "</tool_call>")
MISTRAL_CALL = ("[TOOL_CALLS]", '[{"name": "get-time", "arguments": {}}]')


@pytest.mark.parametrize(("template", "parts"), [(t.HERMES, HERMES_CALL), (t.MISTRAL, MISTRAL_CALL)])
def test_a_marker_may_be_a_token_or_spelled_out(model, template, parts):
    grammar = ChatFormat.detect(template, added_tokens=model.added).tool_grammar(TOOLS, "required", parallel=False).text
    whole = [token for part in parts for token in model.tokens(part)]
    spelled = [token for part in parts for char in part for token in model.tokens(char)]
    assert model.accepts(grammar, whole)
    assert model.accepts(grammar, spelled)
    assert not model.accepts(grammar, whole + whole)


@pytest.mark.parametrize(
    ("parameters", "text", "allowed"),
    [
        ({"type": "object", "properties": {"a": {}}}, '{"a": 1}', True),
        ({"type": "object", "properties": {"a": {}}}, '{"a": 1, "b": 2}', False),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, '{"a": 1, "b": 2}', True),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, '{"b": 2}', True),
        ({"type": "object"}, '{"b": [2]}', True),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 7}', True),
        ({"properties": {"a": {"type": "string", "format": "unheard-of"}}}, '{"a": "x"}', True),
        ({"type": "object"}, '{\n  "b": 2}', False),
    ],
)
def test_arguments(parameters, text, allowed):
    model, tool = Model(None), {"type": "function", "function": {"name": "f", "parameters": parameters}}
    grammar = ChatFormat.detect(t.LLAMA_31).tool_grammar([tool], "f", parallel=False).text
    assert model.accepts(grammar, model.tokens(f'{{"name": "f", "parameters": {text}}}')) is allowed


def test_strict_tools_are_enforced_whole():
    function = {
        "name": "f",
        "strict": True,
        "parameters": {"properties": {"a": {"type": "string", "format": "unheard-of"}}},
    }
    grammar = ChatFormat.detect(t.HERMES).tool_grammar(
        [{"type": "function", "function": function}], "f", parallel=False
    )
    assert "unheard-of" in llguidance.LLMatcher.validate_grammar(grammar.text)


def test_what_is_only_for_readers_is_left_out_of_the_grammar():
    words = {"title": "Only words", "description": "Only words", "examples": ["Only words"]}
    inner = {"description": {"enum": ["kept"], **words}, "title": {"anyOf": [{"const": {"title": "kept"}, **words}]}}
    parameters = {"properties": {"items": {"type": "array", "items": {"properties": inner, **words}}}, **words}
    function = {"name": "f", "description": "Only words", "parameters": parameters}
    grammar = ChatFormat.detect(t.HERMES).tool_grammar(
        [{"type": "function", "function": function}], "f", parallel=False
    )
    assert "words" not in grammar.text
    assert grammar.text.count("kept") == 2
    assert '"description": {' in grammar.text


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("schema", [{"enum": ["x" * MAX_GRAMMAR_BYTES]}, nested(100_000)], ids=["long", "deep"])
def test_schemas_that_are_too_large_are_refused_by_field(schema):
    function = {"name": "f", "parameters": {"properties": {"a": schema}}}
    with pytest.raises(InvalidRequest) as caught:
        ChatFormat.detect(t.HERMES).tool_grammar([{"type": "function", "function": function}], "f", parallel=False)
    assert [error.field for error in caught.value.fields] == ["tools"]
