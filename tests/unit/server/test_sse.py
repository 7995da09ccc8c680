"""The stream response by itself: every event once, in order, however slow the other side is."""

import asyncio

import anyio
import pytest

from rbee_worker.errors import Unavailable
from rbee_worker.events import End, Resolving, Token
from rbee_worker.server import sse

HTTP = {"type": "http", "method": "GET", "path": "/", "headers": []}


def tokens(n):
    return [Token(t="x", i=i) for i in range(n)]


def expected(events):
    return b"".join(map(sse.encode, events)) + sse.DONE


class Client:
    """An ASGI server's side: collects what is sent; ``reading`` holds sends back, ``leave()`` disconnects."""

    def __init__(self):
        self.chunks = []
        self.reading = asyncio.Event()
        self.reading.set()
        self._left = asyncio.Event()

    @property
    def body(self):
        return b"".join(self.chunks)

    async def send(self, message):
        await self.reading.wait()
        if message.get("body"):
            self.chunks.append(message["body"])

    async def receive(self):
        await self._left.wait()
        return {"type": "http.disconnect"}

    def leave(self):
        self._left.set()


class Source:
    """Events, then nothing; counts what was read."""

    def __init__(self, events, *, hang=False):
        self.events = list(events)
        self.hang = hang
        self.read = 0
        self.closed = 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.read < len(self.events):
            self.read += 1
            return self.events[self.read - 1]
        if self.hang:
            await asyncio.Event().wait()
        raise StopAsyncIteration

    async def aclose(self):
        self.closed += 1


def stream(source, **options):
    return sse.EventStream(source, failure=options.pop("failure", sse.inference_failed), **options)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_events_that_wait_leave_in_one_write(stand_in):
    async def scenario():
        events, client = [*tokens(50), stand_in.end()], Client()
        source = Source(events)
        response = stream(source)
        await response(HTTP, client.receive, client.send)
        assert client.body == expected(events)
        assert len(client.chunks) == 1
        assert response.state is sse.StreamState.DONE
        assert source.closed == 1

    asyncio.run(scenario())


def test_a_slow_reader_holds_the_source_back_and_loses_nothing(stand_in):
    async def scenario():
        events, client = [*tokens(1000), stand_in.end()], Client()
        client.reading.clear()
        source = Source(events)
        serving = asyncio.create_task(stream(source, keep_alive=0.001)(HTTP, client.receive, client.send))
        await asyncio.sleep(0.02)  # long enough for a keep-alive to be due: what waits is no silence
        assert 0 < source.read < 200
        client.reading.set()
        await serving
        assert client.body == expected(events)

    asyncio.run(scenario())


def test_keep_alives_interleave_with_events_without_losing_one():
    async def source():
        for event in tokens(30):
            await asyncio.sleep(0.004)
            yield event
        yield END

    async def scenario():
        client = Client()
        await stream(source(), keep_alive=0.005)(HTTP, client.receive, client.send)
        assert client.body.replace(sse.KEEP_ALIVE, b"") == expected([*tokens(30), END])

    asyncio.run(scenario())


@pytest.mark.parametrize("when", ["before the first event", "between events"])
def test_leaving_calls_on_close_once_and_closes_the_source(when):
    async def scenario():
        client, calls = Client(), []
        source = Source(tokens(0 if when.startswith("before") else 2), hang=True)
        response = stream(source, on_close=lambda: calls.append(1), keep_alive=0)
        serving = asyncio.create_task(response(HTTP, client.receive, client.send))
        await settle()
        client.leave()
        await serving
        assert (calls, source.closed) == ([1], 1)
        assert sse.DONE not in client.body

    asyncio.run(scenario())


def test_a_cancelled_response_still_cleans_up():
    async def scenario():
        client, closed = Client(), []

        async def source():
            try:
                yield tokens(1)[0]
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.01)  # cleanup that waits must not be cut short
                closed.append(1)

        serving = asyncio.create_task(stream(source())(HTTP, client.receive, client.send))
        await settle()
        serving.cancel()
        await asyncio.wait({serving})
        assert closed == [1]

    asyncio.run(scenario())


def test_a_response_in_a_cancelled_scope_still_cleans_up():
    async def scenario():
        client, source = Client(), Source(tokens(1), hang=True)
        with anyio.move_on_after(0.02):
            await stream(source)(HTTP, client.receive, client.send)
        assert source.closed == 1

    asyncio.run(scenario())


def test_on_close_is_not_called_after_the_terminal_event(stand_in):
    async def scenario():
        client, calls = Client(), []
        await stream(Source([stand_in.end()]), on_close=lambda: calls.append(1))(HTTP, client.receive, client.send)
        assert calls == []

    asyncio.run(scenario())


def test_finish_ends_a_stuck_stream_with_an_error_and_done():
    async def scenario():
        client, open_streams = Client(), set()
        response = stream(Source(tokens(1), hang=True), open_streams=open_streams)
        serving = asyncio.create_task(response(HTTP, client.receive, client.send))
        await settle()
        assert open_streams == {response}
        response.finish(Unavailable("stopping"))
        await serving
        assert open_streams == set()
        error = b'data: {"event":"error","code":"UNAVAILABLE","message":"stopping"}\n\n'
        assert client.body == sse.encode(tokens(1)[0]) + error + sse.DONE

    asyncio.run(scenario())


def test_an_encoder_that_fails_ends_the_stream_in_order(stand_in):
    async def scenario():
        client = Client()
        broken = Token(t=b"bytes", i=0)  # no JSON
        await stream(Source([broken, stand_in.end()]))(HTTP, client.receive, client.send)
        assert b'"code":"INTERNAL_ERROR"' in client.body
        assert client.body.endswith(b"}\n\n" + sse.DONE)

    asyncio.run(scenario())


def test_shared_frames_encode_once_per_event(monkeypatch):
    made = []
    monkeypatch.setattr(sse, "to_json", lambda event: made.append(event) or "{}")
    frames = sse.SharedFrames(size=2)
    first, second, third = (Resolving(seq=i, elapsed_seconds=0.0, model="m") for i in range(3))
    for event in (first, first, second, first, third, second, first):
        frames(event)
    assert made == [first, second, third, first]  # the third one pushed the first one out
    assert len(frames._frames) == 2


def test_equal_events_are_not_confused_with_one_that_has_gone():
    frames = sse.SharedFrames(size=1)
    seen = {frames(Resolving(seq=i, elapsed_seconds=0.0, model="m")) for i in range(100)}
    assert len(seen) == 100


END = End(
    tokens_out=30,
    decode_time_ms=1,
    stop_reason="eos",
    prompt_tokens=1,
    cached_tokens=0,
    prefill_time_ms=1,
    tokens_per_second=1.0,
)
