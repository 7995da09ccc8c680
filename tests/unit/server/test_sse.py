"""The stream response by itself: every frame once, in order, however slow the other side is."""

import asyncio
import selectors

import anyio
import pytest

from rbee_worker.errors import NotFound, Unavailable
from rbee_worker.server import sse
from rbee_worker.server.http.envelope import inference_failed

HTTP = {"type": "http", "method": "GET", "path": "/", "headers": []}


def frames(n):
    return [sse.frame({"i": i}) for i in range(n)]


def expected(sent):
    return b"".join(sent) + sse.DONE


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
    """Frames, then nothing; counts what was read."""

    def __init__(self, frames, *, hang=False, error=None):
        self.frames = list(frames)
        self.hang = hang
        self.error = error
        self.read = 0
        self.closed = 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.read < len(self.frames):
            self.read += 1
            return self.frames[self.read - 1]
        if self.error is not None:
            raise self.error
        if self.hang:
            await asyncio.Event().wait()
        raise StopAsyncIteration

    async def aclose(self):
        self.closed += 1


class Hurried(selectors.DefaultSelector):
    """Never waits: counts the seconds that were to be waited."""

    seconds = 0.0

    def select(self, timeout=None):
        self.seconds += timeout or 0.0
        return super().select(0)


def run_hurried(scenario):
    """Run it on a loop whose clock jumps to the next timer as soon as nothing else is to be done."""

    def loop():
        selector = Hurried()
        made = asyncio.SelectorEventLoop(selector)
        made.time = lambda: selector.seconds
        return made

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario)


def stream(source, **options):
    return sse.EventStream(source, failure=inference_failed, **options)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_frame_is_one_line_of_json_after_its_name():
    assert sse.frame({"t": "é\n\udc80"}) == b'data: {"t":"\xc3\xa9\\n\\udc80"}\n\n'
    assert sse.frame({}, "a.b") == b"event: a.b\ndata: {}\n\n"


def test_frames_that_wait_leave_in_one_write():
    async def scenario():
        client, source = Client(), Source(frames(50))
        response = stream(source)
        await response(HTTP, client.receive, client.send)
        assert client.body == expected(frames(50))
        assert len(client.chunks) == 1
        assert response.state is sse.StreamState.DONE
        assert source.closed == 1

    asyncio.run(scenario())


def test_a_slow_reader_holds_the_source_back_and_loses_nothing():
    async def scenario():
        client, source = Client(), Source(frames(1000))
        client.reading.clear()
        serving = asyncio.create_task(stream(source, keep_alive=10)(HTTP, client.receive, client.send))
        await asyncio.sleep(25)  # keep-alives are due: what waits is no silence
        assert 0 < source.read < 200
        client.reading.set()
        await serving
        assert client.body == expected(frames(1000))

    run_hurried(scenario())


@pytest.mark.parametrize(
    ("keep_alive", "gap", "each"),
    [(10, 9, {0}), (10, 10, {0, 1}), (10, 25, {2}), (0, 100, {0})],
    ids=["no silence", "at once", "silence", "off"],
)
def test_keep_alives_come_after_silence_and_no_frame_is_lost(keep_alive, gap, each):
    async def source():
        for frame in frames(10):
            await asyncio.sleep(gap)
            yield frame

    async def scenario():
        client = Client()
        await stream(source(), keep_alive=keep_alive)(HTTP, client.receive, client.send)
        assert client.body.replace(sse.KEEP_ALIVE, b"") == expected(frames(10))
        before_frames = client.body.split(b"data: ")[:10]
        assert {before.count(sse.KEEP_ALIVE) for before in before_frames} <= each

    run_hurried(scenario())


@pytest.mark.parametrize("when", ["before the first frame", "between frames"])
def test_leaving_calls_on_close_once_and_closes_the_source(when):
    async def scenario():
        client, calls = Client(), []
        source = Source(frames(0 if when.startswith("before") else 2), hang=True)
        response = stream(source, on_close=lambda: calls.append(1), keep_alive=0)
        serving = asyncio.create_task(response(HTTP, client.receive, client.send))
        await settle()
        client.leave()
        await serving
        assert (calls, source.closed) == ([1], 1)
        assert sse.DONE not in client.body

    asyncio.run(scenario())


def test_a_response_that_never_began_calls_on_close():
    async def scenario():
        calls = []

        async def source():
            try:
                yield frames(1)[0]
            finally:
                calls.append("cleanup")

        await stream(source(), on_close=lambda: calls.append("closed")).aclose()
        assert calls == ["closed"]  # a generator that never began has no cleanup

    asyncio.run(scenario())


@pytest.mark.parametrize("begun", [[], frames(1)], ids=["at once", "later"])
def test_a_source_that_fails_before_its_first_frame_raises_and_later_it_sends_the_failure(begun):
    async def scenario():
        client, source = Client(), Source(begun, error=NotFound("no"))
        response = stream(source)
        if not begun:
            with pytest.raises(NotFound):
                await response.first_frame(None)
            await response.aclose()
            assert source.closed == 1
            return
        await response.first_frame(None)
        await response(HTTP, client.receive, client.send)
        assert client.body == expected([*begun, inference_failed(NotFound("no"))])

    asyncio.run(scenario())


def test_a_first_frame_that_comes_late_is_not_lost():
    async def source():
        await asyncio.sleep(3)
        for frame in frames(2):
            yield frame

    async def scenario():
        client, response = Client(), stream(source())
        await response.first_frame(1)
        await response(HTTP, client.receive, client.send)
        assert client.body == expected(frames(2))

    run_hurried(scenario())


def test_a_cancelled_response_still_cleans_up():
    async def scenario():
        client, closed = Client(), []

        async def source():
            try:
                yield frames(1)[0]
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(1)  # cleanup that waits must not be cut short
                closed.append(1)

        serving = asyncio.create_task(stream(source())(HTTP, client.receive, client.send))
        await settle()
        serving.cancel()
        await asyncio.wait({serving})
        assert closed == [1]

    run_hurried(scenario())


def test_a_response_in_a_cancelled_scope_still_cleans_up():
    async def scenario():
        client, source = Client(), Source(frames(1), hang=True)
        with anyio.move_on_after(1):
            await stream(source)(HTTP, client.receive, client.send)
        assert source.closed == 1

    run_hurried(scenario())


def test_on_close_is_not_called_when_the_source_has_ended():
    async def scenario():
        client, calls = Client(), []
        await stream(Source(frames(1)), on_close=lambda: calls.append(1))(HTTP, client.receive, client.send)
        assert calls == []

    asyncio.run(scenario())


UNAVAILABLE = b'data: {"event":"error","code":"UNAVAILABLE","message":"stopping"}\n\n'


def test_finish_ends_a_stuck_stream_with_an_error_and_done():
    async def scenario():
        client, open_streams = Client(), set()
        response = stream(Source(frames(1), hang=True), open_streams=open_streams)
        serving = asyncio.create_task(response(HTTP, client.receive, client.send))
        await settle()
        assert open_streams == {response}
        response.finish(Unavailable("stopping"))
        await serving
        assert open_streams == set()
        assert client.body == expected([*frames(1), UNAVAILABLE])

    asyncio.run(scenario())


@pytest.mark.parametrize("hang", [False, True])
def test_finish_sends_what_there_is_to_a_client_that_did_not_read(hang):
    async def scenario():
        client = Client()
        client.reading.clear()
        response = stream(Source(frames(500), hang=hang))
        serving = asyncio.create_task(response(HTTP, client.receive, client.send))
        await settle()
        response.finish(Unavailable("stopping"))
        await settle()
        client.reading.set()
        await serving
        # An answer that is whole is not followed by an error.
        assert client.body == expected([*frames(500), *([UNAVAILABLE] if hang else [])])

    asyncio.run(scenario())


def test_a_source_whose_cleanup_hangs_does_not_hold_back_its_end():
    async def scenario():
        client, may_end = Client(), asyncio.Event()

        async def source():
            try:
                yield frames(1)[0]
                await asyncio.Event().wait()
            finally:
                await may_end.wait()

        response = stream(source())
        serving = asyncio.create_task(response(HTTP, client.receive, client.send))
        await settle()
        response.finish(Unavailable("stopping"))
        await settle()
        assert client.body == expected([*frames(1), UNAVAILABLE])
        may_end.set()
        await serving

    asyncio.run(scenario())


def test_a_source_that_cannot_be_closed_costs_the_client_nothing(caplog):
    class Stuck(Source):
        async def aclose(self):
            raise ZeroDivisionError

    async def serve():
        client, sent = Client(), frames(3)
        await stream(Stuck(sent))(HTTP, client.receive, client.send)
        assert client.body == expected(sent)

    asyncio.run(serve())
    assert "closing a stream's source failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text
