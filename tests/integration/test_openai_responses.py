"""``/v1/responses`` by the official client, against a real worker."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from httpx_sse import connect_sse
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel

from tests.tiny import CHAT_TEMPLATE, write_tiny_model

from .conftest import Served, serving, wait_until_idle

LOOK: Any = {
    "type": "function",
    "name": "look",
    "description": "Look at something.",
    "parameters": {
        "type": "object",
        "properties": {"at": {"enum": ["sky", "sea"]}},
        "required": ["at"],
        "additionalProperties": False,
    },
    "strict": True,
}
LONG: dict[str, Any] = {"max_output_tokens": 3900, "extra_body": {"ignore_eos": True}}
THINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("responses") / "tiny-chat"
    write_tiny_model(path, chat_template=CHAT_TEMPLATE, max_position_embeddings=4096)
    options = ("--dtype", "float32", "--max-batch-size", "4", "--keep-alive", "0.3")
    with serving("--model", str(path), "--served-model-name", "gpt-tiny", *options) as served:
        yield served


@pytest.fixture(scope="module")
def client(worker: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def answer_of(response: Response) -> str:
    """The text, after a strict look at all of the response; the client itself takes anything."""
    Response.model_validate(response.to_dict())
    return response.output_text


def test_a_response_streamed_and_whole_is_the_same(client: OpenAI) -> None:
    asked: Any = {"model": "gpt-tiny", "input": "hi", "max_output_tokens": 8, "extra_body": {"seed": 5}}
    whole = client.responses.create(**asked, instructions="Be brief.", metadata={"a": "b"})
    text = answer_of(whole)
    assert text
    assert (whole.status, whole.model, whole.metadata) == ("incomplete", "gpt-tiny", {"a": "b"})
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert (whole.usage.output_tokens, whole.usage.total_tokens) == (8, whole.usage.input_tokens + 8)
    events = list(client.responses.create(**asked, instructions="Be brief.", stream=True))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert answer_of(last.response) == text
    assert last.response.usage is not None
    assert last.response.usage.total_tokens == whole.usage.total_tokens


def test_the_clients_own_stream(client: OpenAI) -> None:
    extra = {"regex": "<think>because</think>blue", **THINKING}
    with client.responses.stream(model="gpt-tiny", input="hi", max_output_tokens=60, extra_body=extra) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == "blue"
    reasoning, message = final.output
    assert isinstance(reasoning, ResponseReasoningItem)
    assert isinstance(message, ResponseOutputMessage)
    assert [part.text for part in reasoning.content or ()] == ["because"]
    assert final.status == "completed"
    assert final.usage is not None
    assert final.usage.output_tokens_details.reasoning_tokens == len("because")


def test_a_conversation_goes_on_with_what_it_was_given(client: OpenAI) -> None:
    extra = {"regex": "<think>because</think>blue", **THINKING}
    given: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    first = client.responses.create(model="gpt-tiny", input=given, max_output_tokens=60, extra_body=extra)
    given += [item.to_dict() for item in first.output]
    given += [{"role": "user", "content": "why?"}]
    again = client.responses.create(model="gpt-tiny", input=given, max_output_tokens=2)
    assert again.usage is not None
    assert first.usage is not None
    assert again.usage.input_tokens > first.usage.input_tokens + len("blue")


class Sky(BaseModel):
    colour: Literal["blue", "grey"]
    clouds: bool


def test_structured_output(client: OpenAI) -> None:
    asked: Any = {"model": "gpt-tiny", "input": "hi", "max_output_tokens": 200, "extra_body": {"seed": 1}}
    parsed = client.responses.parse(**asked, text_format=Sky)
    assert isinstance(parsed.output_parsed, Sky)
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"
    with client.responses.stream(**asked, text_format=Sky) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Sky)
    plain = client.responses.create(**asked, text={"format": {"type": "json_object"}})
    assert plain.status == "incomplete" or isinstance(json.loads(plain.output_text), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look"}])
def test_tools(client: OpenAI, choice: Any) -> None:
    asked: Any = {
        "model": "gpt-tiny", "input": "hi", "tools": [LOOK], "tool_choice": choice, "parallel_tool_calls": False,
        "max_output_tokens": 200, "extra_body": {"seed": 1},
    }  # fmt: skip
    whole = client.responses.create(**asked)
    (call,) = whole.output
    Response.model_validate(whole.to_dict())
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, whole.status) == ("look", "completed")
    assert json.loads(call.arguments)["at"] in {"sky", "sea"}
    with client.responses.stream(**asked) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert snapshots[-1] == streamed.arguments
    assert isinstance(streamed.parsed_arguments, dict)
    history: Any = [
        {"role": "user", "content": "hi"},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "blue"},
    ]
    again = client.responses.create(model="gpt-tiny", input=history, tools=[LOOK], max_output_tokens=2)
    assert again.status == "incomplete"


def test_logprobs(client: OpenAI) -> None:
    asked: Any = {
        "model": "gpt-tiny", "input": "hi", "max_output_tokens": 6, "include": ["message.output_text.logprobs"],
        "top_logprobs": 3, "extra_body": {"seed": 9},
    }  # fmt: skip
    whole = client.responses.create(**asked)
    text = answer_of(whole)
    (message,) = whole.output
    assert isinstance(message, ResponseOutputMessage)
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in part.logprobs)
    assert b"".join(bytes(token.bytes) for token in part.logprobs).decode(errors="replace") == text
    told = [
        token.token
        for event in client.responses.create(**asked, stream=True)
        if event.type == "response.output_text.delta"
        for token in event.logprobs
    ]
    assert told == [token.token for token in part.logprobs]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [LOOK | {"name": "no spaces"}]}, "tools[0].name"),
        ({"input": "x" * 5000}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_refused_is_named(client: OpenAI, fields: Any, param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            client.responses.create(**{"model": "gpt-tiny", "input": "hi", "stream": stream} | fields)
        assert raised.value.param == param


def test_other_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="gpt-4o", input="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.InternalServerError) as late:
        client.responses.create(model="gpt-tiny", input="hi", max_output_tokens=3900, extra_body={
            "timeout": 0.05, "ignore_eos": True,
        })  # fmt: skip
    assert late.value.status_code == 504


def test_a_stream_that_is_cut_short_raises(worker: Served, client: OpenAI) -> None:
    stream = client.responses.create(model="gpt-tiny", input="hi", stream=True, **LONG)
    created = next(stream)
    assert created.type == "response.created"
    httpx.delete(f"{worker.url}/v1/inference/{created.response.id}").raise_for_status()
    with pytest.raises(openai.APIError) as raised:
        list(stream)
    assert raised.value.code == "CANCELLED"


def test_leaving_ends_the_job(worker: Served, client: OpenAI) -> None:
    with client.responses.create(model="gpt-tiny", input="hi", stream=True, **LONG) as stream:
        next(iter(stream))
        assert httpx.get(f"{worker.url}/v1/worker").json()["running"] == 1
    wait_until_idle(worker)
    with pytest.raises(openai.APITimeoutError):
        client.responses.create(model="gpt-tiny", input="hi", timeout=0.2, **LONG)
    wait_until_idle(worker)


def test_the_asynchronous_client(worker: Served) -> None:
    async def talk() -> None:
        async with AsyncOpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0) as client:
            asked: Any = {"model": "gpt-tiny", "input": "hi", "max_output_tokens": 5, "extra_body": {"seed": 1}}
            whole = await client.responses.create(**asked)
            stream = await client.responses.create(stream=True, **asked)
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            assert "".join(deltas) == whole.output_text

    asyncio.run(talk())


def test_frames_by_httpx_sse_and_curl(worker: Served) -> None:
    asked = {"input": "hi", "stream": True, "max_output_tokens": 3}
    with httpx.Client() as http, connect_sse(http, "POST", f"{worker.url}/v1/responses", json=asked) as source:
        *events, done = list(source.iter_sse())
    assert (done.event, done.data) == ("message", "[DONE]")
    assert all(json.loads(event.data)["type"] == event.event for event in events)
    command = ["curl", "-sSN", f"{worker.url}/v1/responses", "-d", json.dumps(asked)]
    body = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert body.startswith("event: response.created\ndata: {")
    assert body.endswith("\n\ndata: [DONE]\n\n")
