"""Responses, streamed and whole, from the same events; each as the official client's types have it."""

import asyncio
import json
import threading
from contextlib import aclosing

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from rbee_worker.errors import InferenceError, InvalidRequest, QueueFull, Unavailable
from rbee_worker.events import InferenceFailed, Token
from rbee_worker.server.openai.responses.body import ResponsesBody
from rbee_worker.server.openai.responses.events import ResponseWriter
from rbee_worker.server.openai.responses.responses import begin_response, to_conversation
from tests.unit.server.openai.conftest import ScriptedWorker, end, logprob, objects, started, texts

EVENT = TypeAdapter(ResponseStreamEvent)
LOOK = {"type": "function", "name": "look", "description": "d", "parameters": {"type": "object"}, "strict": True}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
PATH = "/v1/responses"


def begin(worker, fields):
    body = ResponsesBody.parse({"input": "hi"} | fields)
    return begin_response(worker, to_conversation(body, "key"), "resp_1"), ResponseWriter(body, "resp_1")


def whole(worker, **fields):
    async def run():
        choices, writer = begin(worker, fields)
        return await writer.whole(choices, "m")

    found = asyncio.run(run())
    Response.model_validate(found)
    return found


def events(worker, **fields):
    """Every event, parsed strictly by the official client's types, numbered in order."""

    async def run():
        choices, writer = begin(worker, fields)
        return await objects(writer.frames(choices, "m"))

    told = asyncio.run(run())
    for event in told:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    return told


def kinds(told):
    return [event["type"].removeprefix("response.") for event in told]


def without_ids_and_times(response):
    items = [{key: value for key, value in item.items() if key not in {"id", "call_id"}} for item in response["output"]]
    return response | {"output": items, "created_at": None, "completed_at": None}


def test_the_events_of_an_answer_in_order():
    told = events(ScriptedWorker(texts("Hel", "lo")))
    assert kinds(told) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    created, _, added, part, first, second, done, _, item, completed = told
    assert (created["response"]["status"], created["response"]["output"], created["response"]["usage"]) == (
        "in_progress", [], None,
    )  # fmt: skip
    assert added["item"] == {
        "id": item["item"]["id"], "type": "message", "status": "in_progress", "role": "assistant", "content": [],
    }  # fmt: skip
    assert part["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert (first["delta"], second["delta"], done["text"]) == ("Hel", "lo", "Hello")
    assert {event["item_id"] for event in (part, first, second, done)} == {item["item"]["id"]}
    assert item["item"]["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert completed["response"]["output"] == [item["item"]]
    assert completed["response"]["status"] == "completed"


def test_a_whole_answer_is_what_its_stream_ends_with():
    for script in (texts("Hel", "lo"), texts("a", reason="max_tokens"), texts("<think>hm</think>", CALL)):
        fields = {"tools": [LOOK], "top_logprobs": 2}
        response = whole(ScriptedWorker(script), **fields)
        assert without_ids_and_times(events(ScriptedWorker(script), **fields)[-1]["response"]) == without_ids_and_times(
            response
        )


def test_usage():
    script = [started(), *texts("<think>", "hmm", "</think>", "yes")[1:-1], end("eos", 6, cached=4)]
    assert whole(ScriptedWorker(script))["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 11,
    }


def test_reasoning_message_and_calls_are_items_of_their_own():
    told = events(ScriptedWorker(texts("<think>h", "m</think>", "Look:\n", CALL, CALL)), tools=[LOOK])
    output = told[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    reasoning, message, first, second = output
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert reasoning["summary"] == []
    assert message["content"][0]["text"] == "Look:"
    assert (first["name"], json.loads(first["arguments"]), first["status"]) == ("look", {"at": "sky"}, "completed")
    assert first["call_id"] != second["call_id"]
    assert len({item["id"] for item in output}) == 4
    for index, item in enumerate(output):
        own = [event for event in told if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added"
        assert own[-1] == {"type": "response.output_item.done", "output_index": index, "item": item} | {
            "sequence_number": own[-1]["sequence_number"]
        }
        assert {event.get("item_id", item["id"]) for event in own} == {item["id"]}
        assert [event["sequence_number"] for event in own] == list(
            range(own[0]["sequence_number"], own[-1]["sequence_number"] + 1)
        ), "one item after the other"
    arguments = [event for event in told if event["type"].startswith("response.function_call_arguments.")]
    assert "".join(event.get("delta", "") for event in arguments) == first["arguments"] + second["arguments"]
    assert [event["arguments"] for event in arguments if "arguments" in event] == [
        first["arguments"], second["arguments"],
    ]  # fmt: skip
    thoughts = [event for event in told if event["type"].startswith("response.reasoning_text.")]
    assert ("".join(event.get("delta", "") for event in thoughts), thoughts[-1]["text"]) == ("hm", "hm")


@pytest.mark.parametrize("reason", ["max_tokens", "context_full"])
def test_an_answer_that_was_cut_short_is_incomplete(reason):
    told = events(ScriptedWorker(texts("<think>a</think>", "b", reason=reason)))
    assert told[-1]["type"] == "response.incomplete"
    response = told[-1]["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["usage"]["output_tokens"] == 2
    assert response["completed_at"] is None
    assert whole(ScriptedWorker(texts("<think>a", reason=reason)))["output"][-1]["type"] == "reasoning"


def test_an_answer_without_a_word_is_an_empty_message():
    for script in (texts(), texts("<think>a</think>")):
        item = whole(ScriptedWorker(script))["output"][-1]
        assert (item["type"], item["content"][0]["text"]) == ("message", "")
    assert "output_text.delta" not in kinds(events(ScriptedWorker(texts())))


def test_only_one_call_where_only_one_is_wanted():
    output = whole(ScriptedWorker(texts(CALL, CALL)), tools=[LOOK], parallel_tool_calls=False)["output"]
    assert [item["type"] for item in output] == ["function_call"]


def test_logprobs_are_those_of_the_text():
    """Not those of the reasoning and its markers."""
    worker = ScriptedWorker(texts("<think>", "hm", "</think>", "\n\nyes", " é"))
    told = events(worker, include=["message.output_text.logprobs"])
    content = told[-1]["response"]["output"][-1]["content"][0]
    assert content["text"] == "yes é"
    assert [entry["token"] for entry in content["logprobs"]] == ["\n\nyes", " é"]
    assert content["logprobs"][1] == {
        "token": " é", "logprob": -0.5, "bytes": [32, 195, 169], "top_logprobs": [],
    }  # fmt: skip
    deltas = [event for event in told if event["type"] == "response.output_text.delta"]
    assert [entry["token"] for event in deltas for entry in event["logprobs"]] == ["\n\nyes", " é"]
    assert (
        next(event for event in told if event["type"] == "response.output_text.done")["logprobs"]
        == (content["logprobs"])
    )


def test_logprobs_of_a_character_that_spans_tokens():
    head, tail = logprob("é"), logprob("é")
    halves = [Token(t="a", i=0, logprobs=(logprob("a"), head)), Token(t="é", i=1, logprobs=(tail,))]
    worker = ScriptedWorker([started(), *halves, end("eos", 3)])
    deltas = [event for event in events(worker, top_logprobs=1) if "delta" in event]
    assert [[entry["token"] for entry in event["logprobs"]] for event in deltas] == [["a"], ["é"]]
    broken = [Token(t="é", i=0, logprobs=(logprob("x"),)), end("eos", 1)]
    (delta,) = [event for event in events(ScriptedWorker([started(), *broken]), top_logprobs=1) if "delta" in event]
    assert [entry["token"] for entry in delta["logprobs"]] == ["x"]


def test_without_logprobs_there_are_none():
    content = whole(ScriptedWorker(texts("a")))["output"][0]["content"][0]
    assert content["logprobs"] == []


def test_the_request_is_repeated():
    schema = {"type": "object", "properties": {}}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]}
    fields = {
        "instructions": "be", "max_output_tokens": 9, "max_tool_calls": 2, "metadata": {"a": "b"}, "temperature": 0.5,
        "parallel_tool_calls": False, "prompt_cache_key": "k", "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "s", "tool_choice": choice, "tools": [LOOK], "top_logprobs": 3, "top_p": 0.5, "user": "u",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
    }  # fmt: skip
    response = whole(ScriptedWorker(texts("{}")), store=True, **fields)
    assert {key: response[key] for key in fields} == fields
    assert (response["store"], response["truncation"], response["background"]) == (False, "disabled", False)
    assert (response["id"], response["object"], response["model"]) == ("resp_1", "response", "m")
    plain = whole(ScriptedWorker(texts("a")))
    assert (plain["metadata"], plain["tools"], plain["tool_choice"]) == ({}, [], "auto")
    assert (plain["text"], plain["instructions"]) == ({"format": {"type": "text"}}, None)


def test_a_failure_is_raised_when_nothing_is_streamed():
    failure = InferenceFailed(code="INFERENCE_FAILED", message="The step failed.")
    with pytest.raises(InferenceError, match="The step failed"):
        whole(ScriptedWorker([*texts("a")[:-1], failure]))


@pytest.mark.parametrize(
    ("error", "codes"),
    [
        (InferenceError("no"), ("INFERENCE_FAILED", "server_error")),
        (Unavailable("no"), ("UNAVAILABLE", "server_error")),
        (QueueFull("no"), ("rate_limit_exceeded", "rate_limit_exceeded")),
        (InvalidRequest("no"), ("INVALID_REQUEST", "invalid_prompt")),
    ],
)
def test_the_events_of_a_failure(error, codes):
    async def run():
        _, silent = begin(ScriptedWorker(texts("a")), {})
        choices, writer = begin(ScriptedWorker(texts("a")), {})
        async with aclosing(writer.frames(choices, "m")) as frames:
            for _ in range(5):
                await anext(frames)
        return [
            [
                json.loads(frame.split(b"\ndata: ")[1])
                for frame in one.failed(error).removesuffix(b"\n\n").split(b"\n\n")
            ]
            for one in (silent, writer)
        ]

    (alone,), (told, whole_one) = asyncio.run(run())
    assert (alone["sequence_number"], alone["code"], alone["message"]) == (0, codes[0], "no")
    for event in (alone, told, whole_one):
        EVENT.validate_python(event)
    assert (told["sequence_number"], whole_one["sequence_number"]) == (5, 6)
    assert told["error"]["message"] == told["message"] == "no"
    assert (whole_one["response"]["status"], whole_one["response"]["model"]) == ("failed", "m")
    assert whole_one["response"]["error"] == {"code": codes[1], "message": "no"}


# -- over a socket


def test_the_bytes_of_a_stream(start, worker_of):
    reply = start(worker_of(texts("é", "\n"))).ask("POST", PATH, {"input": "hi", "stream": True})
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    assert reply.frames[-1] == b"data: [DONE]"
    assert b"\r" not in reply.body
    for frame in reply.frames[:-1]:
        kind, data = frame.split(b"\n")
        assert kind == b"event: " + json.loads(data.removeprefix(b"data: "))["type"].encode()


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_before_its_first_token_is_no_200(start, worker_of, stream):
    worker = worker_of([started(), InferenceFailed(code="INFERENCE_FAILED", message="no")])
    reply = start(worker).ask("POST", PATH, {"input": "hi", "stream": stream})
    assert (reply.status, reply.json["error"]["message"]) == (500, "no")


def test_what_fails_later_says_so_in_its_stream(start, worker_of):
    failure = InferenceFailed(code="INFERENCE_FAILED", message="no")
    worker = worker_of([*texts("a")[:-1], 0.02, failure])
    reply = start(worker).ask("POST", PATH, {"input": "hi", "stream": True})
    told = [json.loads(frame.split(b"\ndata: ")[1]) for frame in reply.frames[:-1]]
    assert [event["type"] for event in told[-2:]] == ["error", "response.failed"]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert told[-1]["response"]["id"] == told[0]["response"]["id"] == worker.requests[0].job_id
    assert reply.frames[-1] == b"data: [DONE]"


def test_a_failure_behind_a_keep_alive_has_no_response_to_speak_of(start, worker_of):
    gate = threading.Event()
    worker = worker_of([gate, InferenceFailed(code="INFERENCE_FAILED", message="no")])
    stream = start(worker, keep_alive_seconds=0.1).open("POST", PATH, {"input": "hi", "stream": True})
    assert stream.read_until(b": keep-alive\n\n").startswith(b": keep-alive")
    gate.set()
    *_, error, done = stream.finish().frames
    assert error.startswith(b"event: error\ndata: ")
    assert done == b"data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_job(start, stand_in, worker_of, stream):
    worker = worker_of([*texts("a")[:-1], stand_in.HANG])
    server = start(worker)
    exchange = server.open("POST", PATH, {"input": "hi", "stream": stream})
    if stream:
        exchange.read_until(b"output_text.delta")
    else:
        server.wait(lambda: worker.jobs.running == 1)
    exchange.leave()
    server.wait(lambda: worker.jobs.running == 0)
    assert worker.requests


def test_held_requests_begin_when_the_load_has_ended(start, worker_of):
    worker = worker_of(texts("a"))
    worker.changing, served, worker.engine.model = True, worker.engine.model, None

    async def settled():
        while worker.changing:
            await asyncio.sleep(0.005)

    worker.settled = settled
    server = start(worker, hold_requests=True, keep_alive_seconds=0.1)
    held = server.open("POST", PATH, {"input": "hi", "stream": True})
    held.read_until(b": keep-alive\n\n")
    worker.changing, worker.engine.model = False, served
    frames = held.finish().frames
    completed = json.loads(frames[-2].split(b"\ndata: ")[1])
    assert (completed["type"], completed["response"]["model"]) == ("response.completed", "m")


def test_a_cancelled_job_is_no_short_answer(start, worker_of, stand_in):
    worker = worker_of([*texts("a")[:-1], stand_in.HANG])
    server = start(worker)
    client = server.open("POST", PATH, {"input": "hi", "stream": True})
    client.read_until(b"output_text.delta")
    assert server.ask("DELETE", f"/v1/inference/{worker.requests[0].job_id}").status == 204
    *_, error, response, _ = client.finish().frames
    assert b'"code":"CANCELLED"' in error
    assert response.startswith(b"event: response.failed\n")
