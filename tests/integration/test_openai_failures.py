"""What OpenAI's clients see when something goes wrong, and what happens when they leave; also curl and httpx-sse."""

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from httpx_sse import connect_sse
from openai import AsyncOpenAI, OpenAI

from .conftest import RawConnection, Served, eventually, serving, wait_until_idle

HI: Any = [{"role": "user", "content": "hi"}]
LONG: dict[str, Any] = {"max_tokens": 3900, "extra_body": {"ignore_eos": True}}


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"modalities": ["text", "audio"], "audio": {"format": "wav", "voice": "x"}}, openai.BadRequestError, "audio"),
        ({"functions": [{"name": "f"}]}, openai.BadRequestError, "functions"),
        ({"messages": [{"role": "user", "content": "long " * 1000}]}, openai.BadRequestError, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "messages[0].content[0]",
        ),
        ({"model": "gpt-4o"}, openai.NotFoundError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own(
    client: OpenAI, fields: Any, error: Any, param: str | None, *, stream: bool
) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(**({"model": "gpt-tiny", "messages": HI, "stream": stream} | fields))
    assert raised.value.param == param
    assert raised.value.type in {"invalid_request_error", "not_found_error"}
    assert raised.value.request_id


def test_codes_that_programs_look_for(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="gpt-tiny", prompt="long " * 1000)
    assert raised.value.code == "context_length_exceeded"


def test_a_wrong_key(chat_model: Path) -> None:
    with serving("--model", str(chat_model), "--api-key", "sesame", wait=False) as served:
        with (
            OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError) as raised,
        ):
            stranger.models.list()
        assert raised.value.code == "invalid_api_key"
        with OpenAI(base_url=f"{served.url}/v1", api_key="sesame") as friend:
            assert friend.models.list().object == "list"


def test_a_full_queue_is_retried_after_what_it_says(worker: Served, client: OpenAI) -> None:
    wait_until_idle(worker)
    # Long enough to be there still when the next one asks, and not so long that the next one is told to wait for long.
    body = json.dumps({"prompt": "x", "n": 8, "stream": True, "max_tokens": 1000, "ignore_eos": True}).encode()
    busy = RawConnection(worker.address, "POST", "/v1/completions", body)
    busy.read_until(b'"text"')
    with pytest.raises(openai.RateLimitError) as raised:
        client.completions.create(model="gpt-tiny", prompt="x", max_tokens=1)
    assert int(raised.value.response.headers["retry-after"]) >= 1
    busy.close()
    answer = client.with_options(max_retries=5).completions.create(model="gpt-tiny", prompt="x", max_tokens=1)
    assert answer.usage is not None


def test_all_choices_find_a_place_or_none(worker: Served, client: OpenAI) -> None:
    wait_until_idle(worker)
    with pytest.raises(openai.BadRequestError, match="makes 9 jobs; this worker runs and queues 8 at most"):
        client.completions.create(model="gpt-tiny", prompt="x", n=9)
    long = client.completions.create(model="gpt-tiny", prompt="x", stream=True, **LONG)
    next(iter(long))
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="gpt-tiny", prompt="x", n=8)
    assert httpx.get(f"{worker.url}/v1/worker").json()["running"] == 1
    long.close()
    wait_until_idle(worker)


def test_a_deadline_of_its_own_is_not_retried(worker: Served) -> None:
    sent: list[httpx.Request] = []
    patient = OpenAI(
        base_url=f"{worker.url}/v1",
        api_key="none",
        max_retries=3,
        http_client=httpx.Client(event_hooks={"request": [sent.append]}),
    )
    extra = {"timeout": 0.2, "ignore_eos": True}
    with patient, pytest.raises(openai.InternalServerError) as raised:
        patient.completions.create(model="gpt-tiny", prompt="x", max_tokens=3900, n=4, extra_body=extra)
    assert (raised.value.status_code, raised.value.code) == (504, "DEADLINE_EXCEEDED")
    assert len(sent) == 1
    wait_until_idle(worker)


# -- leaving


def test_a_client_that_gives_up_waiting_ends_its_job(worker: Served, client: OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(model="gpt-tiny", messages=HI, n=2, **LONG)
    wait_until_idle(worker)


def test_a_stream_that_is_closed_ends_all_its_jobs(worker: Served, client: OpenAI) -> None:
    with client.chat.completions.create(model="gpt-tiny", messages=HI, n=2, stream=True, **LONG) as stream:
        next(iter(stream))
        assert httpx.get(f"{worker.url}/v1/worker").json()["running"] == 2
    wait_until_idle(worker)


def test_the_asynchronous_client(worker: Served) -> None:
    async def talk() -> None:
        async with AsyncOpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0) as client:
            asked: Any = {"model": "gpt-tiny", "messages": HI, "max_tokens": 5, "seed": 1}
            whole, other = await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(2)))
            assert whole.choices[0].message.content == other.choices[0].message.content
            stream = await client.chat.completions.create(stream=True, **asked)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == whole.choices[0].message.content
            long = asyncio.create_task(client.chat.completions.create(model="gpt-tiny", messages=HI, **LONG))
            await asyncio.to_thread(eventually, lambda: httpx.get(f"{worker.url}/v1/worker").json()["running"])
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="gpt-tiny", prompt="")

    asyncio.run(talk())
    wait_until_idle(worker)


# -- without the client


def test_curl(worker: Served) -> None:
    body = json.dumps({"model": "gpt-tiny", "messages": HI, "stream": True, "max_tokens": 3})
    command = ["curl", "-sSN", "-i", f"{worker.url}/v1/chat/completions", "-d", body]
    head, _, rest = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.partition(
        "\n\n" if "\r" not in body else "\r\n\r\n"
    )
    assert head.startswith("HTTP/1.1 200")
    frames = [frame for frame in rest.split("\n\n") if frame]
    assert all(frame.startswith("data: {") for frame in frames[:-1])
    assert frames[-1] == "data: [DONE]"


def test_httpx_sse(worker: Served) -> None:
    asked = {"prompt": "x", "stream": True, "max_tokens": 3}
    with httpx.Client() as http, connect_sse(http, "POST", f"{worker.url}/v1/completions", json=asked) as source:
        events = list(source.iter_sse())
    assert events[-1].data == "[DONE]"
    assert {event.event for event in events} == {"message"}
    assert all(json.loads(event.data)["object"] == "text_completion" for event in events[:-1])


def test_keep_alives_while_it_waits_for_its_turn(worker: Served) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 3900, "ignore_eos": True, "n": 4}
    busy = RawConnection(worker.address, "POST", "/v1/completions", json.dumps(body).encode())
    busy.read_until(b'"text"')
    waiting = RawConnection(
        worker.address, "POST", "/v1/completions", json.dumps(body | {"max_tokens": 2, "n": 1}).encode()
    )
    assert waiting.read_until(b": keep-alive\n\n").startswith(b"HTTP/1.1 200")
    busy.close()
    assert waiting.finish().body.endswith(b"data: [DONE]\n\n")
