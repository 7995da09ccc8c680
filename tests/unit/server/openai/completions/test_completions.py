"""Completions, streamed and whole, from the same events."""

import asyncio
from dataclasses import replace

import pytest

from rbee_worker.events import PromptLogprobs, PromptProgress, Token
from rbee_worker.server.openai.completions.body import CompletionBody
from rbee_worker.server.openai.completions.completions import begin_completion, completion_frames, whole_completion
from tests.unit.server.openai.conftest import ScriptedWorker, end, logprob, objects, started, texts


def both(worker, **fields):
    """The response, and the chunks of the same request as a stream."""

    async def run():
        body = CompletionBody.parse({"prompt": "pro"} | fields)
        response = await whole_completion(begin_completion(worker, body, ""), body, "m")
        return response, await objects(completion_frames(begin_completion(worker, body, ""), body, "m"))

    return asyncio.run(run())


def streamed(chunks, index=0):
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


def test_a_completion():
    response, chunks = both(ScriptedWorker(texts("a", "b")), stream_options={"include_usage": True})
    assert response["choices"] == [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}]
    assert response["object"] == "text_completion"
    assert response["usage"]["total_tokens"] == 7
    *parts, last = chunks
    assert [part["choices"][0]["text"] for part in parts] == ["a", "b", ""]
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None, "stop"]
    assert [part["usage"] for part in parts] == [None] * 3
    assert (last["choices"], last["usage"]) == ([], response["usage"])
    assert len({part["id"] for part in chunks}) == 1


def test_every_prompt_gets_n_answers_and_counts_once():
    worker = ScriptedWorker(*(texts(text) for text in "abcd"))
    response, chunks = both(worker, prompt=["p", "q"], n=2, seed=5)
    assert [choice["text"] for choice in response["choices"]] == list("abcd")
    assert [streamed(chunks, index) for index in range(4)] == list("abcd")
    assert (response["usage"]["prompt_tokens"], response["usage"]["completion_tokens"]) == (10, 4)
    assert [request.prompt for request in worker.requests[:4]] == ["p", "p", "q", "q"]
    assert [request.sampling.seed for request in worker.requests[:4]] == [5, 6, 5, 6]


def test_token_ids_go_as_they_are():
    worker = ScriptedWorker(texts("a"))
    response, chunks = both(worker, prompt=[104, 105], echo=True)
    assert (worker.requests[0].prompt, worker.requests[0].prompt_ids) == (None, (104, 105))
    text = worker.the_tokenizer.decode([104, 105])
    assert response["choices"][0]["text"] == streamed(chunks) == text + "a"


def test_echo_with_logprobs_begins_with_the_prompt():
    prompt = PromptLogprobs(logprobs=(logprob("p", None), logprob("ro", -1.0, logprob("x", -0.1))))
    worker = ScriptedWorker([started(), prompt, *texts("a")[1:]])
    response, chunks = both(worker, echo=True, logprobs=1)
    assert worker.requests[0].sampling.prompt_logprobs == 1
    assert response["choices"][0]["text"] == streamed(chunks) == "proa"
    logprobs = response["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["p", "ro", "a"],
        "token_logprobs": [None, -1.0, -0.5],
        "top_logprobs": [None, {"x": -0.1, "ro": -1.0}, {"a": -0.5}],
        "text_offset": [0, 1, 3],
    }
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [part["text_offset"] for part in parts if part] == [[0, 1], [3]]


def test_no_tokens_at_all():
    """``max_tokens`` 0 asks the engine for one token, which is not told."""
    prompt = PromptLogprobs(logprobs=(logprob("pro", None),))
    worker = ScriptedWorker([started(), prompt, *texts("a", reason="max_tokens")[1:]])
    response, chunks = both(worker, echo=True, max_tokens=0, logprobs=0)
    assert worker.requests[0].sampling.max_tokens == 1
    (choice,) = response["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("pro", "length") == (streamed(chunks), "length")
    assert choice["logprobs"]["tokens"] == ["pro"]
    assert response["usage"]["completion_tokens"] == 0


def test_offsets_count_characters_and_a_token_within_one_has_its_place():
    snow = "\N{SNOWMAN}"
    first, second = snow.encode()[:2], snow.encode()[2:]
    pieces = [
        replace(logprob("\ufffd", -1.0), bytes=tuple(first)),
        replace(logprob("\ufffd", float("-inf")), bytes=tuple(second)),
        logprob("é"),
        logprob("z"),
    ]
    worker = ScriptedWorker([started(), Token(t=f"{snow}éz", i=0, logprobs=tuple(pieces)), end()])
    logprobs = both(worker, logprobs=0)[0]["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 0, 1, 2]
    assert logprobs["tokens"] == ["bytes:\\xe2\\x98", "bytes:\\x83", "é", "z"]
    assert logprobs["token_logprobs"][1] == -9999.0


def test_a_token_before_the_prompt_stands_at_its_beginning():
    prompt = PromptLogprobs(logprobs=(logprob("<s>", None), logprob("p"), logprob("ro")))
    worker = ScriptedWorker([started(), prompt, *texts("a")[1:]])
    assert both(worker, echo=True, logprobs=0)[0]["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 3]


@pytest.mark.parametrize("echo", [False, True])
def test_without_logprobs_none_are_asked_for(echo):
    worker = ScriptedWorker(texts("a"))
    both(worker, echo=echo)
    sampling = worker.requests[0].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (None, None)


def test_prompt_progress_is_told_once_a_prompt():
    progress = PromptProgress(total=9, cached=2, processed=5, elapsed_ms=3)
    worker = ScriptedWorker(*([started(), progress, *texts(text)[1:]] for text in "ab"))
    _, chunks = both(worker, n=2, return_progress=True, stream=True)
    told = [chunk for chunk in chunks if "prompt_progress" in chunk]
    assert [chunk["prompt_progress"] for chunk in told] == [{"total": 9, "cache": 2, "processed": 5, "time_ms": 3}]
    assert told[0]["choices"][0]["text"] == ""
    assert [streamed(chunks, index) for index in range(2)] == ["a", "b"]
