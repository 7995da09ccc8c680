"""The official client against a real worker: what works with OpenAI works with this."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from .conftest import serving

HI: Any = [{"role": "user", "content": "hi"}]
LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at something.",
        "parameters": {"type": "object", "properties": {"at": {"enum": ["sky", "sea"]}}, "required": ["at"]},
    },
}


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


# -- models


def test_models(client: OpenAI, chat_model: Path) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("gpt-tiny", "model", "rbee-worker")
    assert model.model_extra is not None
    assert (model.model_extra["status"], model.model_extra["max_model_len"]) == ("ready", 4096)
    assert client.models.retrieve("tiny-chat").id == "tiny-chat"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("other")
    assert raised.value.code == "model_not_found"
    for name in ("gpt-tiny", "tiny-chat", str(chat_model)):  # as it was named when it was loaded, too
        assert client.completions.create(model=name, prompt="x", max_tokens=1).model == "gpt-tiny"


def test_no_model_is_an_empty_list(chat_model: Path) -> None:
    with (
        serving("--model", str(chat_model), "--no-load", wait=False) as served,
        OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert client.models.list().data == []
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(model="x", messages=HI)
        assert raised.value.status_code == 503
        assert int(raised.value.response.headers["retry-after"]) <= 60


def test_a_client_that_comes_during_the_load_is_served_by_its_retries(gguf_path: Path) -> None:
    with (
        serving("--model", str(gguf_path), wait=False) as served,
        OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=20) as client,
    ):
        (loading,) = client.models.list().data
        assert loading.model_extra is not None
        assert loading.model_extra["status"] == "loading"
        answer = client.chat.completions.create(
            model=loading.id,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=10,
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        assert client.models.list().data[0].id == loading.id


# -- completions


def test_a_completion_streamed_and_whole_is_the_same(client: OpenAI) -> None:
    asked: Any = {"model": "gpt-tiny", "prompt": "hello", "max_tokens": 8, "seed": 3}
    whole = client.completions.create(**asked)
    assert whole.id.startswith("cmpl-")
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 8, 13)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 13
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_lists_of_prompts_and_token_ids(client: OpenAI) -> None:
    tokens = httpx.post(f"{client.base_url}../tokenize", json={"content": "hello"}).json()["tokens"]
    asked: Any = {"model": "gpt-tiny", "max_tokens": 3, "temperature": 0}
    alone = client.completions.create(prompt="hello", **asked).choices[0].text
    several = client.completions.create(prompt=["hello", "world"], n=2, **asked)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == alone
    assert several.usage is not None
    assert several.usage.prompt_tokens == 10
    assert client.completions.create(prompt=tokens, **asked).choices[0].text == alone
    assert client.completions.create(prompt=[tokens, tokens], **asked).choices[1].text == alone
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(prompt=[tokens, [999]], **asked)
    assert raised.value.param == "prompt"


def test_echo_and_logprobs(client: OpenAI) -> None:
    asked: Any = {"model": "gpt-tiny", "prompt": "héllo", "echo": True, "logprobs": 2, "temperature": 0}
    choice = client.completions.create(max_tokens=3, **asked).choices[0]
    assert choice.text.startswith("héllo")
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 6 + 3
    assert logprobs.text_offset[:6] == [0, 1, 1, 2, 3, 4]
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert all(len(top) in {2, 3} for top in logprobs.top_logprobs[1:])
    for token, top in list(zip(logprobs.tokens, logprobs.top_logprobs, strict=True))[6:]:
        assert max(top, key=top.__getitem__) == token, "greedy: the likeliest"
    scored = client.completions.create(max_tokens=0, **asked)
    assert scored.choices[0].text == "héllo"
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs == pytest.approx(logprobs.token_logprobs[:6], abs=1e-3)
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    streamed = list(client.completions.create(max_tokens=3, stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token for part in parts if part is not None for token in part.tokens or ()] == logprobs.tokens


def test_stop_and_logit_bias(client: OpenAI) -> None:
    asked: Any = {"model": "gpt-tiny", "prompt": "x", "max_tokens": 20}
    letter = httpx.post(f"{client.base_url}../tokenize", json={"prompt": "q"}).json()["tokens"][0]
    forced = client.completions.create(logit_bias={str(letter): 100}, temperature=0, **asked)
    assert forced.choices[0].text == "q" * 20
    stopped = client.completions.create(logit_bias={str(letter): 100}, temperature=0, stop=["qqq"], **asked)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")


# -- chat


def test_a_chat_streamed_and_whole_is_the_same(client: OpenAI) -> None:
    asked: Any = {"model": "tiny-chat", "messages": HI, "max_completion_tokens": 8, "seed": 5}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_every_sampling_parameter_is_taken(client: OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True, "novel": 1}
    answer = client.chat.completions.create(
        model="gpt-tiny", messages=HI, max_tokens=4, temperature=0.8, top_p=0.9, presence_penalty=0.5,
        frequency_penalty=0.5, seed=1, stop=["\n\n\n"], user="u", logit_bias={"3": -100}, extra_body=extra,
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "length"


def test_several_choices_with_logprobs(client: OpenAI) -> None:
    asked: Any = {"model": "gpt-tiny", "messages": HI, "max_tokens": 6, "n": 3, "seed": 9}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 6
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
        data = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert data.decode(errors="replace") == choice.message.content
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_parts_of_text_and_roles(client: OpenAI) -> None:
    call = {"name": "look", "arguments": "{}"}
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        *HI,
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c", "content": "blue"},
    ]  # fmt: skip
    assert client.chat.completions.create(model="gpt-tiny", messages=messages, max_tokens=2).usage is not None


def test_the_prefix_of_an_earlier_answer_is_cached(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "the same long beginning " * 8}]
    for _ in range(2):
        usage = client.chat.completions.create(model="gpt-tiny", messages=messages, max_tokens=2).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert 0 < (usage.prompt_tokens_details.cached_tokens or 0) < usage.prompt_tokens


def test_prompt_progress(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "long " * 300}]
    stream = client.chat.completions.create(
        model="gpt-tiny", messages=messages, max_tokens=2, stream=True, extra_body={"return_progress": True}
    )
    told = [(chunk.model_extra or {}).get("prompt_progress") for chunk in stream]
    figures = [progress for progress in told if progress]
    assert figures
    assert figures[-1].keys() == {"total", "cache", "processed", "time_ms"}
    assert figures[-1]["processed"] == figures[-1]["total"] > 1500


class Sky(BaseModel):
    colour: Literal["blue", "grey"]
    clouds: bool


def test_structured_output(client: OpenAI) -> None:
    asked: Any = {"max_tokens": 200, "seed": 1}
    parsed = client.chat.completions.parse(model="gpt-tiny", messages=HI, response_format=Sky, **asked)
    assert isinstance(parsed.choices[0].message.parsed, Sky)
    assert parsed.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model="gpt-tiny", messages=HI, response_format=Sky, **asked) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Sky)


def test_regex_choice_and_grammar(client: OpenAI) -> None:
    for extra, pattern in (
        ({"regex": "[ab]{3}"}, "[ab]{3}"),
        ({"grammar": 'start: "yes" | "no"'}, "yes|no"),
        ({"guided_choice": ["one", "two (2)"]}, r"one|two \(2\)"),
        ({"structured_outputs": {"regex": "x[0-9]"}}, "x[0-9]"),
    ):
        answer = client.completions.create(model="gpt-tiny", prompt="x", max_tokens=30, extra_body=extra)
        assert re.fullmatch(pattern, answer.choices[0].text)
        assert answer.choices[0].finish_reason == "stop"
    for bad in ({"regex": "("}, {"grammar": "start: nothing"}, {"json_schema": {"type": "nonsense"}}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="gpt-tiny", prompt="x", extra_body=bad)


def test_reasoning_is_separated(client: OpenAI) -> None:
    extra = {"regex": "<think>because</think>blue", "chat_template_kwargs": {"enable_thinking": True}}
    asked: Any = {"model": "gpt-tiny", "messages": HI, "max_tokens": 60, "extra_body": extra}
    message = client.chat.completions.create(**asked).choices[0].message
    assert ((message.model_extra or {})["reasoning_content"], message.content) == ("because", "blue")
    chunks = list(client.chat.completions.create(stream=True, **asked))
    reasoning = [(chunk.choices[0].delta.model_extra or {}).get("reasoning_content") or "" for chunk in chunks]
    assert ("".join(reasoning), text_of(chunks)) == ("because", "blue")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_tools(client: OpenAI, choice: Any) -> None:
    asked: Any = {
        "model": "gpt-tiny", "messages": HI, "tools": [LOOK], "tool_choice": choice, "parallel_tool_calls": False,
        "max_tokens": 200, "seed": 1,
    }  # fmt: skip
    (answer,) = client.chat.completions.create(**asked).choices
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "look"
    assert json.loads(call.function.arguments)["at"] in {"sky", "sea"}
    with client.chat.completions.stream(**asked) as stream:
        (streamed,) = stream.get_final_completion().choices
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls
    assert json.loads(streamed.message.tool_calls[0].function.arguments)["at"] in {"sky", "sea"}
    history: Any = [
        *HI,
        answer.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "blue"},
    ]
    again = client.chat.completions.create(model="gpt-tiny", messages=history, tools=[LOOK], max_tokens=2, seed=1)
    assert again.choices[0].finish_reason == "length"
