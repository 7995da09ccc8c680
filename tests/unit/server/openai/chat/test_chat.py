"""Chat completions, streamed and whole, from the same events."""

import asyncio
from collections import defaultdict

import pytest

from rbee_worker.errors import Cancelled, DeadlineExceeded, InferenceError, InvalidRequest, Unavailable
from rbee_worker.events import InferenceFailed, PromptProgress
from rbee_worker.server.openai.chat.body import ChatBody
from rbee_worker.server.openai.chat.chat import chat_frames, to_conversation, whole_chat
from rbee_worker.server.openai.conversation import begin_conversation
from tests.unit.server.openai.conftest import ScriptedWorker, end, objects, started, texts

USER = {"role": "user", "content": "hi"}
LOOK = {
    "type": "function",
    "function": {"name": "look", "description": "d", "parameters": {"type": "object"}, "strict": True},
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def begin(worker, **fields):
    body = ChatBody.parse({"messages": [USER]} | fields)
    return body, begin_conversation(worker, to_conversation(body, "key"), "chatcmpl-1")


def whole(worker, **fields):
    async def run():
        body, choices = begin(worker, **fields)
        return await whole_chat(choices, body, "chatcmpl-1", "m")

    return asyncio.run(run())


def chunks(worker, **fields):
    async def run():
        body, choices = begin(worker, stream=True, **fields)
        return await objects(chat_frames(choices, body, "chatcmpl-1", "m"))

    return asyncio.run(run())


def assembled(all_chunks):
    """What a client puts together, by choice."""
    out = defaultdict(lambda: {"content": "", "reasoning": "", "calls": defaultdict(str), "finish": []})
    for chunk in all_chunks:
        for choice in chunk["choices"]:
            into, delta = out[choice["index"]], choice["delta"]
            into["content"] += delta.get("content", "")
            into["reasoning"] += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", []):
                into["calls"][call["index"]] += call["function"]["arguments"]
            into["finish"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return out


def test_a_whole_answer():
    response = whole(ScriptedWorker(texts("Hel", "lo")))
    assert response["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    message = {"role": "assistant", "content": "Hello", "refusal": None}
    assert response["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert (response["id"], response["object"], response["model"]) == ("chatcmpl-1", "chat.completion", "m")


def test_the_chunks_of_an_answer_in_order():
    got = chunks(ScriptedWorker(texts("Hel", "lo", reason="max_tokens")), stream_options={"include_usage": True})
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": got[0]["created"], "model": "m"}

    def choice(delta, finish=None):
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]

    assert got[:-1] == [
        head | {"choices": choices, "usage": None}
        for choices in (
            choice({"role": "assistant", "content": ""}),
            choice({"content": "Hel"}),
            choice({"content": "lo"}),
            choice({}, "length"),
        )
    ]
    assert got[-1] == head | {"choices": [], "usage": got[-1]["usage"]}
    assert got[-1]["usage"]["total_tokens"] == 7


def test_without_include_usage_there_is_none():
    assert all("usage" not in chunk for chunk in chunks(ScriptedWorker(texts("a"))))


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("eos", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("context_full", "length")],
)
def test_finish_reasons(reason, finish):
    assert whole(ScriptedWorker(texts("a", reason=reason)))["choices"][0]["finish_reason"] == finish


def test_several_choices_count_their_prompt_once_and_draw_differently():
    worker = ScriptedWorker(texts("a"), [started(), *texts("b", "c")[1:-1], end("eos", 2, cached=4)])
    got = assembled(chunks(worker, n=2, seed=41))
    assert [got[0]["content"], got[1]["content"]] == ["a", "bc"]
    assert [request.sampling.seed for request in worker.requests] == [41, 42]
    assert [request.job_id for request in worker.requests] == ["chatcmpl-1", "chatcmpl-1-1"]
    usage = whole(worker, n=2)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["prompt_tokens_details"]) == (
        5,
        3,
        {"cached_tokens": 0},
    )


def test_logprobs_of_every_token():
    worker = ScriptedWorker(texts("Hel", "lo"))
    content = whole(worker, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["logprob"], entry["bytes"]) for entry in content] == [
        ("Hel", -0.5, [72, 101, 108]),
        ("lo", -0.5, [108, 111]),
    ]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks(worker, logprobs=True)]
    assert [part["content"][0]["token"] for part in streamed if part] == ["Hel", "lo"]
    assert worker.requests[0].sampling.logprobs == 0


def test_logprobs_of_text_that_is_held_back_are_told_with_what_comes_next():
    """Every token is told once, also those of markers, whose text is told nowhere."""
    worker = ScriptedWorker(texts("<think>", "hm", "</think>", "\n\nyes"))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks(worker, logprobs=True)]
    assert [entry["token"] for part in parts if part for entry in part["content"]] == [
        "<think>",
        "hm",
        "</think>",
        "\n\nyes",
    ]


def test_reasoning_is_told_apart():
    worker = ScriptedWorker(texts("<th", "ink>because", "</think>\n\n", "yes"))
    message = whole(worker)["choices"][0]["message"]
    assert (message["reasoning_content"].strip(), message["content"].strip()) == ("because", "yes")
    streamed = assembled(chunks(worker))[0]
    assert (streamed["reasoning"].strip(), streamed["content"].strip()) == ("because", "yes")


def test_tool_calls():
    worker = ScriptedWorker(texts(CALL[:20], CALL[20:]))
    (choice,) = whole(worker, tools=[LOOK])["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert (call["type"], call["function"]) == ("function", {"name": "look", "arguments": '{"at": "sky"}'})
    got = chunks(worker, tools=[LOOK])
    deltas = [call for c in got for call in c["choices"][0]["delta"].get("tool_calls", [])]
    first, *others = deltas
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "look")
    assert first["id"]
    assert all(other.keys() == {"index", "function"} for other in others)
    assert assembled(got)[0]["calls"][0] == '{"at": "sky"}'
    assert assembled(got)[0]["finish"] == ["tool_calls"]


def test_tool_calls_cut_short_are_length():
    choice = whole(ScriptedWorker(texts(CALL, reason="max_tokens")), tools=[LOOK])["choices"][0]
    assert choice["finish_reason"] == "length"


def test_without_tools_a_call_is_text():
    for fields in ({}, {"tools": [LOOK], "tool_choice": "none"}):
        worker = ScriptedWorker(texts(CALL))
        assert whole(worker, **fields)["choices"][0]["message"]["content"] == CALL
        assert "look" not in worker.prompt()


def test_one_call_where_calls_are_not_parallel():
    script = [*texts(CALL, "\n", CALL, "more")[:-1], end("cancelled", 4)]
    worker = ScriptedWorker(script)
    (choice,) = whole(worker, tools=[LOOK], parallel_tool_calls=False)["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["look"]
    assert choice["finish_reason"] == "tool_calls"
    assert worker.cancelled == ["chatcmpl-1"] * len(worker.cancelled) != []
    assert len(whole(ScriptedWorker(texts(CALL, "\n", CALL)), tools=[LOOK])["choices"][0]["message"]["tool_calls"]) == 2


def test_prompt_progress_as_llama_cpp_has_it():
    progress = PromptProgress(total=9, cached=2, processed=5, elapsed_ms=3)
    got = chunks(ScriptedWorker([started(), progress, *texts("a")[1:]]), return_progress=True)
    assert [c["prompt_progress"] for c in got if "prompt_progress" in c] == [
        {"total": 9, "cache": 2, "processed": 5, "time_ms": 3}
    ]
    worker = ScriptedWorker(texts("a"))
    whole(worker, return_progress=True)
    assert not worker.requests[0].prompt_progress


@pytest.mark.parametrize(
    ("event", "state", "error"),
    [
        (InferenceFailed(code="INFERENCE_FAILED", message="x"), "ready", InferenceError),
        (InferenceFailed(code="DEADLINE_EXCEEDED", message="late"), "ready", DeadlineExceeded),
        (InferenceFailed(code="UNAVAILABLE", message="x"), "ready", Unavailable),
        (end("cancelled"), "ready", Cancelled),
        (end("cancelled"), "draining", Unavailable),
    ],
)
def test_an_answer_that_fails_is_an_error_and_never_a_short_answer(event, state, error):
    worker = ScriptedWorker([started(), *texts("a")[1:-1], event])
    worker.state = state
    for collect in (whole, chunks):
        with pytest.raises(error) as raised:
            collect(worker)
        assert type(raised.value) is error


def test_one_of_several_that_fails_fails_all():
    worker = ScriptedWorker(texts("a"), [InferenceFailed(code="INFERENCE_FAILED", message="no")])
    with pytest.raises(InferenceError, match="no"):
        whole(worker, n=2)


# -- what the model is asked


def test_the_prompt_holds_tools_and_earlier_calls_as_the_template_wants_them():
    worker = ScriptedWorker(texts("a"))
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    messages = [{"role": "developer", "content": "be brief"}, USER, {"role": "assistant", "tool_calls": [call]}]
    whole(worker, messages=messages, tools=[LOOK])
    prompt = worker.prompt()
    assert "<|im_start|>system\nbe brief" in prompt, "the template knows no developer"
    assert '{"type": "function", "function": {"name": "look", "description": "d", "parameters":' in prompt
    assert "strict" not in prompt
    assert '{"name": "look", "arguments": {"at": "sky"}}' in prompt, "an object, not its text"


def test_a_template_that_writes_arguments_itself_gets_their_text():
    template = PLAIN.replace("message.content", "message.tool_calls[0].function.arguments + '!'")
    worker = ScriptedWorker(texts("a"), template=template)
    call = {"function": {"name": "look", "arguments": '{"at": "sky"}'}}
    whole(worker, messages=[{"role": "assistant", "tool_calls": [call]}])
    assert '{"at": "sky"}!' in worker.prompt()


@pytest.mark.parametrize(
    ("test", "seen"), [("message.content is none", "None"), ("message['content'] is none", "None")]
)
def test_a_template_that_tests_for_none_gets_it(test, seen):
    template = "{% for message in messages %}{% if " + test + " %}None{% else %}some{% endif %}{% endfor %}"
    worker = ScriptedWorker(texts("a"), template=template)
    call = {"function": {"name": "look", "arguments": "{}"}}
    whole(worker, messages=[{"role": "assistant", "tool_calls": [call]}])
    assert worker.prompt() == seen


def test_a_template_without_tools_is_told_of_them_in_the_system_message():
    worker = ScriptedWorker(texts(CALL), template=PLAIN)
    (choice,) = whole(worker, messages=[{"role": "system", "content": "S"}, USER], tools=[LOOK])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert worker.prompt().startswith("system: S\n\n")
    assert '"name": "look"' in worker.prompt()
    assert worker.prompt().count("system:") == 1


def test_variables_reach_the_template():
    template = "{{ documents[0].text }} {{ x }} {{ reasoning_effort }}"
    worker = ScriptedWorker(texts("a"), template=template)
    whole(worker, documents=[{"text": "D"}], chat_template_kwargs={"x": 7}, reasoning_effort="low")
    assert worker.prompt() == "D 7 low"


def test_required_and_named_tools_are_forced_by_a_grammar():
    for choice in ("required", {"type": "function", "function": {"name": "look"}}):
        worker = ScriptedWorker(texts(CALL))
        whole(worker, tools=[LOOK], tool_choice=choice)
        grammar = worker.requests[0].sampling.grammar
        assert (grammar.kind, "look" in grammar.text) == ("lark", True)


def test_markers_that_are_special_tokens_stay_in_the_text_where_they_mean_something():
    template = PLAIN + "{% if tools %}{{ tools }}[TOOL_CALLS]{% endif %}"
    worker = ScriptedWorker(texts("a"), template=template, special_tokens=["[TOOL_CALLS]"])
    whole(worker, tools=[LOOK], tool_choice="required")
    whole(worker)
    forced, plain = (request.sampling for request in worker.requests)
    assert (forced.skip_special_tokens, plain.skip_special_tokens) == (False, True)
    assert "<[256]>" in forced.grammar.text, "the marker is a token"


def test_a_response_format_beside_tools_leaves_the_choice_to_the_model():
    worker = ScriptedWorker(texts(CALL))
    response_format = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}}
    (choice,) = whole(worker, tools=[LOOK], response_format=response_format)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    grammar = worker.requests[0].sampling.grammar.text
    assert grammar.startswith('start: calls | answer\nanswer: %json {"type": "integer", "x-guidance": {')
    with pytest.raises(InvalidRequest, match="tools must be with tool_choice"):
        whole(worker, tools=[LOOK], regex="a+")


def test_structured_output_begins_with_the_answer():
    worker = ScriptedWorker(texts("{}"))
    whole(worker, response_format={"type": "json_object"})
    assert worker.prompt().endswith("<think>\n\n</think>\n\n"), "the model is told not to think first"
    whole(worker, response_format={"type": "json_object"}, chat_template_kwargs={"enable_thinking": True})
    prompt = worker.the_tokenizer.decode(worker.requests[1].prompt_ids)
    assert prompt.endswith("assistant\n")
    opened = ScriptedWorker(texts("{}"), template=PLAIN + "<think>")
    assert whole(opened, response_format={"type": "json_object"})["choices"][0]["message"]["content"] == "{}"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [LOOK, LOOK]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ],
)
def test_bad_tools_are_named(fields, field):
    with pytest.raises(InvalidRequest) as raised:
        whole(ScriptedWorker(texts("a")), **fields)
    assert [error.field for error in raised.value.fields] == [field]


def test_a_model_without_a_template_takes_no_messages():
    with pytest.raises(InvalidRequest, match="no chat template"):
        whole(ScriptedWorker(texts("a"), template=None))


def test_a_model_that_was_replaced_while_the_prompt_was_made_is_noticed():
    worker = ScriptedWorker(texts("a"))
    other = ScriptedWorker().the_tokenizer
    submit = worker.submit_all

    def replacing(requests):
        worker.the_tokenizer = other
        return submit(requests)

    worker.submit_all = replacing
    with pytest.raises(Unavailable, match="replaced"):
        whole(worker)
    assert worker.cancelled == ["chatcmpl-1"]


LLAMA3 = "<|python_tag|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + PLAIN


def test_a_response_format_beside_tools_whose_calls_look_like_it_is_refused():
    with pytest.raises(InvalidRequest, match="calls look like an answer in JSON") as raised:
        begin(ScriptedWorker(texts("{}"), template=LLAMA3), tools=[LOOK], response_format={"type": "json_object"})
    assert [error.field for error in raised.value.fields] == ["tools"]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_that_the_template_does_not_know_stand_in_the_system_message(system):
    worker = ScriptedWorker(texts("a"), template=PLAIN)
    whole(worker, messages=[*system, USER], tools=[LOOK])
    first, *rest = worker.the_tokenizer.decode(list(worker.requests[0].prompt_ids)).split("user: hi")
    assert first.startswith("system: Be brief.\n\n" if system else "system: ")
    assert '"name": "look"' in first
    assert rest == ["\nassistant:"]


def test_a_worker_that_waits_for_these_jobs_to_change_its_model_serves_them():
    class Changing(ScriptedWorker):
        def tokenizer(self):
            if self.requests:
                raise Unavailable("A model is being loaded.")
            return super().tokenizer()

    assert whole(Changing(texts("a")))["choices"][0]["message"]["content"] == "a"
