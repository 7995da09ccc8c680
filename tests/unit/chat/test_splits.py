"""However an answer is cut, the same comes out of it, and nothing is lost."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.chat.json_scan import JsonScanner
from tests.unit.chat import templates as t

PARTS = (
    "<think>", "</think>", "[THINK]", "[/THINK]", "<response>", "</response>",
    "<tool_call>", "</tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    '{"name": "f", "arguments": {"x": [1, "a"]}}', '{"name": "g", "parameters": {"y": {}}}',
    '{"arguments": "{}", "name": "f"}', "f(x=1, y='a\\'b')", "g()",
    '{"name": ', '"f"', ', "arguments": ', "{", "}", "[", "]", ",", ";", ":", '"', "\\", "'", "(", ")",
    " ", "\n", "f", "g", "x", "1", "-", "null", "text", "<", "</", "[TOOL", "é",
)  # fmt: skip

TEMPLATES = (t.QWEN3, t.HERMES, t.GRANITE_3, t.LLAMA_31, t.MISTRAL, t.MAGISTRAL, t.SEED)
answers = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(at % (len(text) + 1) for at in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.sampled_from(TEMPLATES),
    answers,
    st.lists(st.integers(0, 400), max_size=8),
    st.booleans(),
    st.sampled_from(("", "<think>\n")),
)
def test_any_cut_gives_what_the_whole_text_gives(template, text, cuts, tools, prompt):
    def read(pieces):
        return t.assembled(t.parse(template, pieces, prompt=prompt, tools=tools, names=["f", "g"]))

    whole = read([text])
    assert read(cut(text, cuts)) == whole
    assert read(text) == whole


@given(st.sampled_from(TEMPLATES), answers)
def test_without_a_call_every_character_is_told_once(template, text):
    reasoning, content, calls = t.assembled(t.parse(template, [text], names=["f", "g"]))
    if not reasoning and not calls and not text.lstrip().startswith(("<think>", "[THINK]", "<seed:think>")):
        assert content == text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
calls = st.lists(
    st.tuples(st.sampled_from(("f", "g")), st.dictionaries(st.text(max_size=5), values, max_size=4)),
    min_size=1,
    max_size=3,
)


def hermes(calls):
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in calls
    )


def llama(calls):
    return "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in calls)


def mistral(calls):
    body = ", ".join(f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls)
    return f"[TOOL_CALLS][{body}]"


def mistral_named(calls):
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)


def pythonic(calls):
    listed = [
        f"{name}({', '.join(f'k{index}={value!r}' for index, value in enumerate(json.loads(arguments).values()))})"
        for name, arguments in calls
    ]
    return f"[{', '.join(listed)}]"


STYLES = ((t.HERMES, hermes), (t.LLAMA_31, llama), (t.MISTRAL, mistral), (t.MISTRAL_NAMED, mistral_named))


@given(st.sampled_from(STYLES), calls, st.booleans(), st.lists(st.integers(0, 400), max_size=8))
def test_calls_come_out_as_they_were_written(style, made, ascii_only, cuts):
    template, write = style
    written = [(name, json.dumps(arguments, ensure_ascii=ascii_only)) for name, arguments in made]
    assert t.assembled(t.parse(template, cut(write(written), cuts), names=["f", "g"])) == ("", "", written)


@given(calls, st.lists(st.integers(0, 400), max_size=8))
def test_calls_in_python_come_out_as_the_same_values(made, cuts):
    written = [(name, json.dumps(arguments)) for name, arguments in made]
    reasoning, content, found = t.assembled(t.parse(t.LLAMA_4, cut(pythonic(written), cuts), names=["f", "g"]))
    assert (reasoning, content) == ("", "")
    expected = [(name, list(arguments.values())) for name, arguments in made]
    assert [(name, list(json.loads(arguments).values())) for name, arguments in found] == expected


def scan(pieces):
    scanner = JsonScanner()
    read = 0
    for piece in pieces:
        at = scanner.push(piece)
        read += at
        if at < len(piece):
            break
    return read, scanner.done, scanner.failed


@given(values, st.sampled_from(("", " ", "}", ",1", "x")), st.lists(st.integers(0, 200), max_size=6), st.integers(0, 2))
def test_a_json_value_ends_where_it_ends(value, behind, cuts, indent):
    text = json.dumps([value], indent=indent or None)
    assert scan(cut(text + behind, cuts)) == (len(text), True, False)


@given(st.text(alphabet='[]{},:"\\1e-.tru nl', max_size=30).map("[{}".format))
def test_what_the_scanner_takes_is_json(text):
    read, done, failed = scan([text])
    try:
        json.JSONDecoder(strict=False).raw_decode(text)
        valid = True
    except ValueError:
        valid = False
    if valid:
        assert done
    assert not (done and failed)
    assert (read, done, failed) == scan(text)


@pytest.mark.parametrize(
    "text", ['{"a": 1,}', "[1,]", "[1 2]", "{1: 2}", '{"a" 1}', '{"a": }', "[01]", "[1.]", "[nul]", "[-]", "[}", "[+1]"]
)
def test_what_the_scanner_refuses(text):
    assert scan([text])[1:] == (False, True)
