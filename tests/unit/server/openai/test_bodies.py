"""Bodies of OpenAI's requests: what is read, what is refused, and by which name."""

import json

import pytest

from rbee_worker.config import GrammarSpec
from rbee_worker.errors import InvalidRequest
from rbee_worker.server.openai.chat.body import ChatBody
from rbee_worker.server.openai.chat.chat import to_conversation
from rbee_worker.server.openai.completions.body import COMPLETION_TOKENS, CompletionBody

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat(**fields):
    return ChatBody.parse({"messages": [USER]} | fields)


def completion(**fields):
    return CompletionBody.parse({"prompt": "p"} | fields)


def refusal(parse, **fields):
    with pytest.raises(InvalidRequest) as raised:
        parse(**fields)
    return [error.field for error in raised.value.fields]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_every_form_of_a_prompt(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"),
        ([], "prompt"),
        (["a", ""], "prompt[1]"),
        ([1, "a"], "prompt"),
        ([1, True], "prompt"),
        ([[1], []], "prompt[1]"),
        ([-1], "prompt[0]"),
        ({}, "prompt"),
        (3, "prompt"),
        (["a"] * 129, "prompt"),
    ],
)
def test_bad_prompts_are_named(prompt, field):
    assert refusal(completion, prompt=prompt) == [field]


def test_answers_of_all_prompts_together_are_bounded():
    assert len(completion(prompt=["a"] * 64, n=2).prompts) == 64
    assert refusal(completion, prompt=["a"] * 65, n=2) == ["prompt"]


@pytest.mark.parametrize("value", [0, 129, "2", 1.5, True])
def test_n_out_of_range(value):
    assert refusal(chat, n=value) == ["n"]
    assert refusal(completion, n=value, prompt=["a", "b"]) == ["n"]


def test_max_tokens():
    assert completion().max_tokens == COMPLETION_TOKENS == 16
    assert completion(max_tokens=0, echo=True).max_tokens == 0
    assert refusal(completion, max_tokens=0) == ["max_tokens"]
    assert refusal(chat, max_tokens=0) == ["max_tokens"]
    assert to_conversation(chat(max_tokens=5, max_completion_tokens=7), "").sampling.max_tokens == 7
    assert to_conversation(chat(max_tokens=5), "").sampling.max_tokens == 5
    assert to_conversation(chat(), "").sampling.max_tokens is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"chat_template": "x"}, "chat_template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"stop_token_ids": [3]}, "stop_token_ids"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always", "tools": [TOOL]}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TOOL]},
            "tool_choice.function.name",
        ),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields, field):
    assert field in refusal(chat, **fields)


@pytest.mark.parametrize(("name", "value"), [("suffix", "x"), ("best_of", 3), ("logprobs", 21), ("logprobs", True)])
def test_what_completions_refuse(name, value):
    assert refusal(completion, **{name: value}) == [name]


def test_what_changes_nothing_is_accepted():
    neutral = {
        "functions": [], "function_call": "none", "modalities": ["text"], "best_of": 1, "echo": False, "min_tokens": 0,
        "user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prediction": {}, "novel": 1,
        "tool_choice": "auto", "tools": [], "top_logprobs": 0, "verbosity": "medium", "suffix": None,
    }  # fmt: skip
    assert to_conversation(chat(**neutral), "") == to_conversation(chat(), "")
    assert completion(suffix="", best_of=2, n=2).n == 2


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([USER, {"role": "user"}], "messages[1].content"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0].content"),
        ([{"role": "", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "content": "x", "function_call": {"name": "f"}}], "messages[0].function_call"),
    ],
)
def test_bad_messages_are_named(messages, field):
    assert refusal(chat, messages=messages) == [field]


def test_a_part_of_another_kind_is_said():
    with pytest.raises(InvalidRequest, match="reads no image_url"):
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_messages_as_templates_take_them():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = chat(
        messages=[
            {"role": "user", "content": parts, "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "r"},
            {"role": "tool", "content": "x", "tool_call_id": "c"},
        ]
    )
    assert to_conversation(body, "").messages == (
        {"role": "user", "content": "one\ntwo", "name": "n"},
        {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": "c"},
    )
    given_back = chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}])
    assert given_back.messages[0].tool_calls[0].function.arguments == "{}"


JSON_SCHEMA = GrammarSpec("json_schema", json.dumps(SCHEMA))


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, GrammarSpec("json_object")),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, JSON_SCHEMA),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "strict": True, "schema": SCHEMA},
                }
            },
            JSON_SCHEMA,
        ),
        ({"json_schema": SCHEMA}, JSON_SCHEMA),
        ({"regex": "a+"}, GrammarSpec("regex", "a+")),
        ({"grammar": "start: /a/"}, GrammarSpec("lark", "start: /a/")),
        ({"guided_json": SCHEMA}, JSON_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, JSON_SCHEMA),
        ({"guided_regex": "a"}, GrammarSpec("regex", "a")),
        ({"guided_grammar": "start: /a/"}, GrammarSpec("lark", "start: /a/")),
        ({"guided_choice": ["yes", "no?"]}, GrammarSpec("regex", r"yes|no\?")),
        ({"structured_outputs": {"json": SCHEMA}}, JSON_SCHEMA),
        ({"structured_outputs": {"json_object": True}}, GrammarSpec("json_object")),
        ({"structured_outputs": {"choice": ["a b"]}}, GrammarSpec("regex", "a b")),
    ],
)
def test_every_spelling_of_what_the_text_must_match(fields, grammar):
    assert chat(**fields).grammar_spec == grammar
    assert completion(**fields).sampling().grammar == grammar


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"regex": "a", "grammar": "b"}, "grammar"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
    ],
)
def test_grammars_that_make_no_sense(fields, field):
    assert refusal(lambda **given: chat(**given).grammar_spec, **fields) == [field]


def test_a_conversation_has_what_the_body_says():
    body = chat(
        tools=[TOOL], tool_choice={"type": "function", "function": {"name": "look"}}, parallel_tool_calls=False, n=3,
        documents=[{"text": "d"}], chat_template_kwargs={"x": 1}, reasoning_effort="none", timeout=5, logprobs=True,
        return_progress=True, stream=True, logit_bias={"7": -3}, skip_special_tokens=False,
    )  # fmt: skip
    asked = to_conversation(body, "key-1")
    assert (asked.tool_choice, asked.tool_name, asked.parallel_tool_calls) == ("required", "look", False)
    assert asked.variables == {
        "documents": [{"text": "d"}], "reasoning_effort": "none", "enable_thinking": False, "x": 1,
    }  # fmt: skip
    assert (asked.choices, asked.timeout_seconds, asked.client, asked.prompt_progress) == (3, 5, "key-1", True)
    assert (asked.sampling.logprobs, asked.sampling.logit_bias) == (0, ((7, -3.0),))
    assert not asked.sampling.skip_special_tokens


@pytest.mark.parametrize("body_class", [ChatBody, CompletionBody])
def test_the_json_schema_says_the_bounds(body_class):
    properties = body_class.model_json_schema()["properties"]
    assert (properties["temperature"]["minimum"], properties["temperature"]["maximum"]) == (0, 2)
    assert properties["repetition_penalty"]["exclusiveMinimum"] == 0
    assert properties["n"]["maximum"] == 128
    assert {form["type"] for form in properties["stop"]["anyOf"]} == {"string", "array"}
