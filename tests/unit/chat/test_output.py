"""Each family's answers, taken apart."""

import itertools
import json
import re
import time
from collections.abc import Callable

import pytest

from rbee_worker.chat.output import ChatFormat, ContentDelta, OutputParser, ToolCallDelta
from tests.unit.chat import templates as t

F = '{"name": "f", "arguments": {"x": [1, "}"], "y": {"z": "\\"]"}}}'
ARGS = '{"x": [1, "}"], "y": {"z": "\\"]"}}'


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


CALLS = [
    # Hermes and Qwen
    (t.HERMES, hermes(F), "", [("f", ARGS)]),
    (t.HERMES, hermes(F, '{"name": "g", "arguments": {}}') + "\n", "", [("f", ARGS), ("g", "{}")]),
    (t.HERMES, "Let me see.\n" + hermes(F) + "\nDone.\n", "Let me see.\nDone.\n", [("f", ARGS)]),
    (t.HERMES, "\n\n" + hermes(F) + "\n\nDone.", "Done.", [("f", ARGS)]),
    (t.HERMES, '<tool_call>{"arguments" : {"x": 1} , "name":"f"}</tool_call>', "", [("f", '{"x": 1}')]),
    (t.HERMES, hermes('{"name": "f", "arguments": "{\\"x\\": 1}"}'), "", [("f", '{"x": 1}')]),
    (t.HERMES, hermes('{"name": "f", "arguments": null}'), "", [("f", "{}")]),
    (t.HERMES, hermes('{"name": "f"}'), "", [("f", "{}")]),
    (t.HERMES, hermes('{"id": 7, "name": "f", "parameters": {"x": 1}, "extra": [{}]}'), "", [("f", '{"x": 1}')]),
    (t.HERMES, hermes(f"[{F}, {F}]"), "", [("f", ARGS), ("f", ARGS)]),
    (t.HERMES, f"<tool_call>{F}\n<tool_call>{F}", "", [("f", ARGS), ("f", ARGS)]),
    (t.HERMES, hermes('{"name": "unknown", "arguments": {}}'), "", [("unknown", "{}")]),
    (t.HERMES, hermes('{"name": "f", "arguments": {"s": "<tool_call></tool_call>é\\u00e9"}}'), "",
     [("f", '{"s": "<tool_call></tool_call>é\\u00e9"}')]),
    (t.HERMES, hermes('{"name": "f", "arguments": {}, "arguments": [1], "name": 5}'), "", [("f", "{}")]),
    # a template without a known style is taken to use that of Hermes
    (t.PLAIN, hermes(F), "", [("f", ARGS)]),
    (None, hermes(F), "", [("f", ARGS)]),
    # Granite 3
    (t.GRANITE_3, f"<|tool_call|>[{F}]", "", [("f", ARGS)]),
    (t.GRANITE_3, f"<tool_call>[{F}, {F}]</tool_call>", "", [("f", ARGS), ("f", ARGS)]),
    # Llama
    (t.LLAMA_31, '{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
    (t.LLAMA_32, ' {"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    (t.LLAMA_31, '<|python_tag|>{"name": "any", "parameters": {"x": 1}}', "", [("any", '{"x": 1}')]),
    (t.LLAMA_31, "I call." + '<|python_tag|>{"name": "f", "parameters": {}}', "I call.", [("f", "{}")]),
    (t.LLAMA_31, '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": 2}}', "",
     [("f", "{}"), ("g", '{"x": 2}')]),
    (t.LLAMA_31, '{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}};', "", [("f", "{}"), ("g", "{}")]),
    (t.LLAMA_31, '{"name": "f", "parameters": {}}; and more', "; and more", [("f", "{}")]),
    (t.LLAMA_31, '{"name": "f", "parameters": {}};; {"name": "g"}', ';; {"name": "g"}', [("f", "{}")]),
    (t.LLAMA_31, '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]', "", [("f", "{}"), ("g", "{}")]),
    (t.LLAMA_32, "[f(x=1, y='it\\'s'), g()]", "", [("f", '{"x": 1, "y": "it\'s"}'), ("g", "{}")]),
    (t.LLAMA_4, "<|python_start|>[f(x=[1, None], y={'k': True})]<|python_end|>", "",
     [("f", '{"x": [1, null], "y": {"k": true}}')]),
    # Mistral
    (t.MISTRAL, f'[TOOL_CALLS] [{F}, {{"name": "g", "arguments": {{}}, "id": "abcdefghi"}}]', "",
     [("f", ARGS), ("g", "{}")]),
    (t.MISTRAL_NAMED, f"[TOOL_CALLS]f[ARGS]{ARGS}", "", [("f", ARGS)]),
    (t.MISTRAL_NAMED, 'One moment.[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g-2[CALL_ID]abcdefghi[ARGS]{}', "One moment.",
     [("f", '{"x": 1}'), ("g-2", "{}")]),
    (t.MISTRAL, "[TOOL_CALLS]f{}", "", [("f", "{}")]),
    (t.MISTRAL, f"[TOOL_CALLS][{F}] \n", "", [("f", ARGS)]),
    (t.MISTRAL, f"[TOOL_CALLS][{F}, ", "", [("f", ARGS)]),
    (t.MISTRAL, f"[TOOL_CALLS][{F}[TOOL_CALLS][{F}]", "", [("f", ARGS), ("f", ARGS)]),
]  # fmt: skip


@pytest.mark.parametrize(("template", "text", "content", "calls"), CALLS)
def test_calls(template, text, content, calls):
    for pieces in ([text], list(text)):
        assert t.assembled(t.parse(template, pieces, names=["f", "g"])) == ("", content, calls)


NO_CALLS = [
    (t.HERMES, "No call."),
    (t.HERMES, "<tool_call>"),
    (t.HERMES, "<tool_call>\n{}\n</tool_call>"),
    (t.HERMES, "<tool_call>\nnot JSON\n</tool_call> "),
    (t.HERMES, '<tool_call>\n{"name": "f", "argum'),
    (t.HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    (t.HERMES, '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    (t.HERMES, '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    (t.HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (t.HERMES, '<tool_call>{"name": "f", "arguments": "x = 1"}</tool_call>'),
    (t.HERMES, '<tool_call>{"name": "f", "arguments": nil}</tool_call>'),
    (t.HERMES, '<tool_call>{"arguments": {"x": 1}}</tool_call>'),
    (t.HERMES, '<tool_call>{"arguments": {"x": 1}, 7}'),
    (t.HERMES, "<tool_call>[]</tool_call>"),
    (t.HERMES, "A <tool_ca"),
    (t.HERMES, "  \n "),
    (t.HERMES, '{"name": "f", "arguments": {}}'),
    (t.QWEN3_CODER, "<tool_call>\n<function=f>\n</function>\n</tool_call>"),
    (t.LLAMA_31, '{"city": "Paris"}'),
    (t.LLAMA_31, '{"name": "other", "parameters": {}}'),
    (t.LLAMA_31, 'Call {"name": "f", "parameters": {}}'),
    (t.LLAMA_31, "<|python_tag|>print(1)"),
    (t.LLAMA_31, "[see](https://example.com) [f(1)]"),
    (t.LLAMA_31, "[other(x=1)]"),
    (t.LLAMA_31, "[f(1)]"),
    (t.LLAMA_31, "[f(x=y)]"),
    (t.LLAMA_31, "[f(x=1"),
    (t.LLAMA_31, "[f(x=[1)]"),
    (t.LLAMA_31, " [1, 2]"),
    (t.MISTRAL, "[TOOL_CALLS] are made so"),
    (t.MISTRAL, "[TOOL_CALLS]f[ARGS]no"),
    (t.MISTRAL, "[TOOL_CALLS]" + "f" * 300 + "[ARGS]{}"),
]


@pytest.mark.parametrize(("template", "text"), NO_CALLS)
def test_what_is_no_call_is_content(template, text):
    for pieces in ([text], list(text)):
        assert t.assembled(t.parse(template, pieces, names=["f", "g"])) == ("", text, [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>{"name": "f", "arguments": {"x": ]}}</tool_call>', "]}}</tool_call>", [("f", '{"x": ')]),
        ('<tool_call>{"name": "f", "arguments": {"x": 01}}', "}}", [("f", '{"x": 01')]),
        ('<tool_call>{"name": "f", "arguments": {}]</tool_call>', "]</tool_call>", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"x": "unfin', "", [("f", '{"x": "unfin')]),
        ('<tool_call>{"name": "f", "arguments": {}}\n</tool_c', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}\n</tool_x', "</tool_x", [("f", "{}")]),
        (f"<tool_call>x</tool_call>\n{hermes(F)}", "<tool_call>x</tool_call>", [("f", ARGS)]),
        (f"{hermes(F)}\nSo.\n", "So.\n", [("f", ARGS)]),
    ],
)
def test_a_call_that_breaks_is_kept_so_far_and_the_rest_is_content(text, content, calls):
    for pieces in ([text], list(text)):
        assert t.assembled(t.parse(t.HERMES, pieces)) == ("", content, calls)


REASONING = [
    (t.QWEN3, "", "<think>\nHm.\n\nSo.\n</think>\n\nHello", "Hm.\n\nSo.", "Hello"),
    (t.QWEN3, "…assistant\n<think>\n\n</think>\n\n", "Hello </think>", "", "Hello </think>"),
    (t.QWEN3, "", "<think>\n\n</think>\n\nHello", "", "Hello"),
    (t.QWEN3, "", "Hello <think>there</think>", "", "Hello <think>there</think>"),
    (t.QWEN3, "", "\n <thin ice", "", "\n <thin ice"),
    (t.QWEN3_THINKING, "…assistant\n<think>\n", "Hm.\n</think>\n\nHello\n", "Hm.", "Hello\n"),
    (t.QWEN3_THINKING, "…assistant\n<think>\n", "Hm, cut off </thi", "Hm, cut off </thi", ""),
    (t.QWEN3_THINKING, "…assistant\n<think>\n", "<think>\nHm.</think>Hi", "Hm.", "Hi"),
    (t.DEEPSEEK_R1, "<|Assistant|><think>\n", "Hm </think", "Hm </think", ""),
    (t.DEEPSEEK_R1, "<|Assistant|><think>\n", "<thi", "<thi", ""),
    (t.SMOLLM3, "", "<think>Hm</think>Hello", "Hm", "Hello"),
    (t.GRANITE_3, "", "<think>Hm</think> <response>Hello</response>", "Hm", "Hello"),
    (t.GRANITE_3, "", "<think>Hm</think> <response>A</b></resp", "Hm", "A</b></resp"),
    (t.GRANITE_3, "", "<think>Hm</think> <resp", "Hm", "<resp"),
    (t.GRANITE_3, "", "<think>Hm</think> Hello", "Hm", "Hello"),
    (t.GRANITE_32, "", "Here is my thought process:\nHm\n\nHere is my response:\nHello", "Hm", "Hello"),
    (t.MAGISTRAL, "", "[THINK]Hm[/THINK]Hello", "Hm", "Hello"),
    (t.SEED, "", "<seed:think>Hm</seed:think>Hello", "Hm", "Hello"),
    (t.PLAIN, "", "<think>Hm</think>", "", "<think>Hm</think>"),
    (t.QWEN3, "", "<think>Hm", "Hm", ""),
    (t.QWEN3, "", "<think>a \n b", "a \n b", ""),
]


@pytest.mark.parametrize(("template", "prompt", "text", "reasoning", "content"), REASONING)
def test_reasoning(template, prompt, text, reasoning, content):
    for pieces, tools in itertools.product(([text], list(text)), (False, True)):
        deltas = t.parse(template, pieces, prompt=prompt, tools=tools)
        found, said, calls = t.assembled(deltas)
        assert (found, said, calls) == (reasoning, content, [])


def test_reasoning_then_calls():
    text = "<think>Call <tool_call>?\n</think>\n\n" + hermes(F)
    assert t.assembled(t.parse(t.QWEN3, [text])) == ("Call <tool_call>?", "", [("f", ARGS)])
    text = "[THINK]Hm[/THINK][TOOL_CALLS]f[ARGS]{}"
    assert t.assembled(t.parse(t.MAGISTRAL, [text])) == ("Hm", "", [("f", "{}")])


def test_without_tools_calls_are_content_and_nothing_is_held():
    parser = ChatFormat.detect(t.LLAMA_31).parser("", tools=False)
    assert parser.push(' {"name": ') == [ContentDelta(' {"name": ')]
    assert (parser.finish(), parser.tool_calls) == ([], 0)


def steps(parser: OutputParser, *pieces: str) -> list[list[object]]:
    return [[str(getattr(d, "text", "") or d.name or d.arguments) for d in parser.push(piece)] for piece in pieces]


def test_arguments_are_told_as_they_arrive():
    parser = ChatFormat.detect(t.HERMES).parser("", tools=True)
    pieces = ["Wait. <tool", '_call>\n{"na', 'me": "f", "argu', 'ments": {"a', '": "b', " c", '"}', "}\n</tool_call>"]
    assert steps(parser, *pieces) == [["Wait."], [], [], ["f", '{"a'], ['": "b'], [" c"], ['"}'], []]


def test_content_is_told_as_soon_as_it_cannot_be_a_marker():
    parser = ChatFormat.detect(t.HERMES).parser("", tools=True)
    assert steps(parser, "a <", "tool", "s", "> ", "b") == [["a"], [], [" <tools"], [">"], [" b"]]


def test_json_that_is_no_call_is_told_at_once():
    parser = ChatFormat.detect(t.LLAMA_31).parser("", tools=True, tool_names=["f"])
    assert steps(parser, '{"ci', 'ty": "Os', "lo", '"}') == [[], ['{"city": "Os'], ["lo"], ['"}']]


def test_neighbours_in_one_piece_are_one_delta():
    parser = ChatFormat.detect(t.HERMES).parser("", tools=True)
    assert steps(parser, "a <tool", "x> b <tool_call>c</tool_call> d") == [
        ["a"],
        [" <toolx> b <tool_call>c</tool_call> d"],
    ]


def test_white_space_before_reasoning_is_dropped_wherever_it_is_cut():
    for pieces in (["<think>", "\n Hm", "</think>"], ["<think>\n", " Hm</think>"]):
        assert t.assembled(t.parse(t.QWEN3, pieces)) == ("Hm", "", [])


def test_ids():
    [call, _] = t.parse(t.HERMES, [hermes('{"name": "f", "arguments": {}}')])
    assert isinstance(call, ToolCallDelta)
    assert re.fullmatch(r"call_[0-9a-f]{24}", call.id)
    [call, _] = t.parse(t.MISTRAL, ["[TOOL_CALLS]f[ARGS]{}"])
    assert isinstance(call, ToolCallDelta)
    assert re.fullmatch(r"[A-Za-z0-9]{9}", call.id)


@pytest.mark.parametrize(
    ("template", "style", "opens"),
    [
        (None, None, None),
        (t.PLAIN, None, None),
        (t.HERMES, "hermes", None),
        (t.QWEN3, "hermes", "<think>"),
        (t.QWEN3_CODER, None, None),
        (t.GLM, None, None),
        (t.SMOLLM3, "hermes", "<think>"),
        (t.DEEPSEEK_R1, None, "<think>"),
        (t.GRANITE_3, "granite", "<think>"),
        (t.GRANITE_32, None, "Here is my thought process:"),
        (t.LLAMA_31, "llama3", None),
        (t.LLAMA_32, "llama3", None),
        (t.LLAMA_4, "llama3", None),
        (t.MISTRAL, "mistral", None),
        (t.MAGISTRAL, "mistral-named", "[THINK]"),
        (t.SEED, None, "<seed:think>"),
    ],
)
def test_detection(template, style, opens):
    found = ChatFormat.detect(template)
    assert (found.tool_style.name if found.tool_style else None) == style
    assert (found.reasoning.opens if found.reasoning else None) == opens


def test_special_tokens_are_kept_where_markers_are_such():
    assert not ChatFormat.detect(t.PLAIN).keeps_special_tokens
    assert not ChatFormat.detect(t.QWEN3).keeps_special_tokens
    assert ChatFormat.detect(t.LLAMA_31).keeps_special_tokens
    assert ChatFormat.detect(t.MISTRAL).keeps_special_tokens
    assert ChatFormat.detect(t.QWEN3, special_tokens=["</think>"]).keeps_special_tokens
    assert not ChatFormat.detect(t.MISTRAL, special_tokens=["<s>"]).keeps_special_tokens


def test_templates_that_take_tools():
    assert ChatFormat.detect(t.HERMES).takes_tools
    assert not ChatFormat.detect(t.PLAIN).takes_tools


LONG = 40_000


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (t.HERMES, "<" * LONG),
        (t.HERMES, "\n" * LONG),
        (t.HERMES, "<tool_call>" + " " * LONG),
        (t.HERMES, '<tool_call>{"name": "' + "f" * LONG),
        (t.HERMES, '<tool_call>{"name": "f", "arguments": ' + '{"a":' * (LONG // 5)),
        (t.HERMES, '<tool_call>{"name": "f", "arguments": {"a": ' + "1" * LONG),
        (t.HERMES, '<tool_call>{"arguments": {"a": "' + "\\n" * (LONG // 2)),
        (t.LLAMA_31, "[f(x='" + "a" * LONG),
        (t.QWEN3, "<think>" + "\n" * LONG),
        (t.MISTRAL, "[TOOL_CALLS]" * (LONG // 12)),
    ],
    ids=range(10),
)
def test_the_time_taken_grows_with_the_length(template, text):
    """Four times the text takes far less than the sixteen times that quadratic work would."""

    def seconds(part: str) -> float:
        begin = time.process_time()
        t.parse(template, part, names=["f"])
        return time.process_time() - begin

    assert grows_slowly(lambda share: seconds(text[: LONG // share]))


def grows_slowly(seconds: Callable[[int], float]) -> bool:
    """Whether the whole takes less than twelve times what a quarter takes; tried again where something disturbed it."""
    return any(seconds(1) < 12 * seconds(4) + 0.1 for _ in range(3))


def test_one_piece_with_many_calls_is_read_in_linear_time():
    def seconds(count: int) -> float:
        begin = time.process_time()
        deltas = t.parse(t.HERMES, [hermes(*[F] * count)])
        assert len(t.assembled(deltas)[2]) == count
        return time.process_time() - begin

    assert grows_slowly(lambda share: seconds(2000 // share))


def test_arguments_are_json():
    [(_, arguments)] = t.assembled(t.parse(t.HERMES, [hermes(F)]))[2]
    assert json.loads(arguments) == {"x": [1, "}"], "y": {"z": '"]'}}
