"""Responses: what their bodies say, what is refused, and what the model is asked."""

import pytest

from rbee_worker.config import GrammarSpec
from rbee_worker.errors import ContextTooLong, FieldError, InvalidRequest
from rbee_worker.server.openai.responses.body import ResponsesBody
from rbee_worker.server.openai.responses.responses import begin_response, to_conversation
from tests.unit.server.openai.conftest import ScriptedWorker, texts

LOOK = {"type": "function", "name": "look", "description": "d", "parameters": {"type": "object"}}
TASTE = {"type": "function", "name": "taste"}
USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": "sky"}'}
TOLD = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "blue"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "It is.", "annotations": []}],
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def asked(**fields):
    return to_conversation(ResponsesBody.parse({"input": "hi"} | fields), "key")


def refusals(**fields):
    with pytest.raises(InvalidRequest) as raised:
        asked(**fields)
    return {error.field: error.message for error in raised.value.fields}


def assistant(content="", **fields):
    return {"role": "assistant", "content": content} | fields


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ("hi", [USER]),
        ([USER], [USER]),
        ([{"role": "user", "content": [{"type": "input_text", "text": part} for part in "ab"]}],
         [{"role": "user", "content": "a\nb"}]),
        ([USER, SAID, USER], [USER, assistant("It is."), USER]),
        ([USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
         [USER, assistant("a"), assistant("b")]),
        ([USER, THOUGHT, SAID, CALL, OUTPUT],
         [USER, assistant("It is.", reasoning_content="hm", tool_calls=[TOLD]),
          {"role": "tool", "content": "blue", "tool_call_id": "c1"}]),
        ([USER, CALL, CALL | {"call_id": "c2"}, OUTPUT, THOUGHT, CALL],
         [USER, assistant(tool_calls=[TOLD, TOLD | {"id": "c2"}]),
          {"role": "tool", "content": "blue", "tool_call_id": "c1"},
          assistant(reasoning_content="hm", tool_calls=[TOLD])]),
        ([SAID, CALL, SAID], [assistant("It is.\n\nIt is.", tool_calls=[TOLD])]),
        ([THOUGHT | {"content": None, "summary": [{"type": "summary_text", "text": "short"}]}, SAID],
         [assistant("It is.", reasoning_content="short")]),
        ([OUTPUT | {"output": [{"type": "input_text", "text": "red"}]}],
         [{"role": "tool", "content": "red", "tool_call_id": "c1"}]),
        ([CALL | {"arguments": {"at": "sky"}}], [assistant(tool_calls=[TOLD])]),
    ],
)  # fmt: skip
def test_items_become_messages(given, messages):
    assert list(asked(input=given).messages) == messages


def test_instructions_are_the_system_message_or_its_beginning():
    assert list(asked(instructions="Be brief.").messages) == [{"role": "system", "content": "Be brief."}, USER]
    for role in ("system", "developer"):
        given = [{"role": role, "content": "In English."}, USER]
        assert list(asked(input=given, instructions="Be brief.").messages) == [
            {"role": role, "content": "Be brief.\n\nIn English."},
            USER,
        ]


@pytest.mark.parametrize(
    ("given", "field", "word"),
    [
        ("", "input", "character"),
        ([], "input", "not empty"),
        (7, "input", "string"),
        ([7], "input[0]", "message"),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0]", "keeps no items"),
        ([{"id": "msg_1"}], "input[0]", "keeps no items"),
        ([USER, {"type": "web_search_call"}], "input[1]", "web_search_call"),
        ([{"type": "secret"}], "input[0]", "reasoning."),
        ([{"role": "tool", "content": "x"}], "input[0].role", "user"),
        ([{"role": "user"}], "input[0].content", "required"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0]", "image"),
        ([CALL | {"call_id": None}], "input[0].call_id", "required"),
        ([{"role": "user", "content": "\ud800"}], "input[0].content", "Unicode"),
    ],
)
def test_bad_items_are_named(given, field, word):
    told = refusals(input=given)
    assert list(told) == [field]
    assert word in told[field]
    assert "secret" not in told[field]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0]"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "smell"}}, "tool_choice.name"),
        ({"tools": [LOOK], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [USER]}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "regex": "a"}, "text.format"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"n": 2}, "n"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"prompt_progress": True}, "prompt_progress"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields, field):
    assert field in refusals(**fields)


def test_what_changes_nothing_is_accepted():
    asked(
        previous_response_id=None, conversation=None, background=False, truncation="disabled", store=True, n=1,
        text={"verbosity": "medium"}, reasoning={"effort": "high", "summary": "auto"}, service_tier="auto",
        user="u", safety_identifier="s", prompt_cache_key="k", prompt_cache_retention="24h", max_tool_calls=3,
        metadata={"a": "b"}, stream_options={"include_obfuscation": False}, include=["reasoning.encrypted_content"],
        tools=[], novel=1,
    )  # fmt: skip


def test_sampling():
    sampling = asked(
        max_output_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop="x", top_k=4, min_p=0.1, repetition_penalty=1.1,
        ignore_eos=True, presence_penalty=1, frequency_penalty=1, logit_bias={"3": 1},
    ).sampling  # fmt: skip
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (9, 0.5, 0.9, 3)
    assert (sampling.stop, sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (("x",), 4, 0.1, 1.1)
    assert (sampling.ignore_eos, sampling.presence_penalty, sampling.frequency_penalty) == (True, 1, 1)
    assert sampling.logit_bias == ((3, 1.0),)
    assert asked().sampling.max_tokens is None
    assert (asked(timeout=2.5).timeout_seconds, asked().client) == (2.5, "key")


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, 3),
        ({"top_logprobs": 2}, 2),
        ({"include": ["reasoning.encrypted_content"]}, None),
    ],
)
def test_logprobs(fields, logprobs):
    assert asked(**fields).sampling.logprobs == logprobs


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"text": {"format": {"type": "text"}}}, None),
        ({"text": {"format": {"type": "json_object"}}}, GrammarSpec("json_object")),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": SCHEMA}}},
            GrammarSpec("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}'),
        ),
        ({"regex": "[ab]"}, GrammarSpec("regex", "[ab]")),
    ],
)
def test_formats(fields, grammar):
    assert asked(**fields).grammar == grammar


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None, ["look", "taste"])),
        ("none", ("none", None, ["look", "taste"])),
        ("required", ("required", None, ["look", "taste"])),
        ({"type": "function", "name": "taste"}, ("required", "taste", ["look", "taste"])),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]},
            ("required", None, ["look"]),
        ),
    ],
)
def test_tools_and_their_choice(choice, expected):
    conversation = asked(tools=[LOOK, TASTE], tool_choice=choice, parallel_tool_calls=False)
    names = [tool["function"]["name"] for tool in conversation.tools]
    assert (conversation.tool_choice, conversation.tool_name, names) == expected
    assert conversation.parallel_tool_calls is False
    assert conversation.tools[0] == {
        "type": "function",
        "function": {"name": "look", "description": "d", "parameters": {"type": "object"}},
    }


def test_effort_none_turns_thinking_off():
    assert asked(reasoning={"effort": "none"}).variables == {"reasoning_effort": "none", "enable_thinking": False}
    assert asked(reasoning={"effort": "low"}).variables == {"reasoning_effort": "low"}
    assert asked(chat_template_kwargs={"enable_thinking": False}).variables == {"enable_thinking": False}
    worker = ScriptedWorker(texts("a"))
    begin_response(worker, asked(reasoning={"effort": "none"}), "resp_1")
    assert "<think>\n\n</think>" in worker.prompt()
    assert worker.requests[0].job_id == "resp_1"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [LOOK | {"name": "no spaces"}]}, "tools[0].name"),
        ({"tools": [LOOK, LOOK]}, "tools[1].name"),
        ({"tools": [LOOK | {"parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
    ],
)
def test_what_the_model_cannot_take_is_named_as_the_request_has_it(fields, field):
    with pytest.raises(InvalidRequest) as raised:
        begin_response(ScriptedWorker(texts("a")), asked(**fields), "resp_1")
    (error,) = raised.value.fields
    assert error.field == field
    assert error.message.startswith(field)
    assert "function." not in str(raised.value)


def test_an_input_that_is_too_long_is_named_as_the_request_has_it():
    class Full(ScriptedWorker):
        def submit_all(self, _requests):
            raise ContextTooLong("Too long.", fields=[FieldError("prompt", "shorter", "Too long.")])

    with pytest.raises(ContextTooLong) as raised:
        begin_response(Full(texts("a")), asked(), "resp_1")
    assert [error.field for error in raised.value.fields] == ["input"]
