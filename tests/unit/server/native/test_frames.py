"""The frames of a job and of a load, without a socket."""

import asyncio

import pytest

from rbee_worker.errors import RbeeError
from rbee_worker.events import Resolving, Token, to_json
from rbee_worker.server.native import frames
from rbee_worker.server.native.frames import SharedFrames, Watcher, inference_frames
from rbee_worker.worker.job import Job


def resolving(seq):
    return Resolving(seq=seq, elapsed_seconds=0.5, model="m")


def encoded(event):
    return b"data: " + to_json(event).encode() + b"\n\n"


def test_a_job_that_is_closed_early_is_cancelled_and_one_that_has_ended_is_not(stand_in):
    async def scenario(*events):
        cancelled = []
        job = Job("a", cancelled.append, None)
        for event in events:
            job.put(event, 1.0)
        source = inference_frames(job)
        read = [await anext(source) for _ in events]
        await source.aclose()
        return read, cancelled

    begun = [stand_in.started(), stand_in.token(0)]
    assert asyncio.run(scenario(*begun)) == (list(map(encoded, begun)), ["a"])
    assert asyncio.run(scenario(*begun, stand_in.end()))[1] == []


def test_what_is_no_json_fails():
    async def scenario():
        job = Job("a", lambda _id: None, None)
        job.put(Token(t=b"bytes", i=0), 1.0)
        await anext(inference_frames(job))

    with pytest.raises(TypeError):
        asyncio.run(scenario())


@pytest.mark.parametrize("told", [0, 2])
def test_the_failure_of_a_watcher_is_numbered_after_what_it_was_told(told):
    async def events():
        for seq in range(told):
            yield resolving(seq)

    async def scenario():
        watcher = Watcher(events(), SharedFrames())
        source = watcher.frames()
        for seq in range(told):
            assert await anext(source) == encoded(resolving(seq))
        with pytest.raises(RbeeError, match="ended before its result"):
            await anext(source)
        assert f'"seq":{told},"elapsed_seconds":{0.5 if told else 0.0}}}'.encode() in watcher.failed(RbeeError("no"))

    asyncio.run(scenario())


def test_shared_frames_encode_once_per_event(monkeypatch):
    made = []
    monkeypatch.setattr(frames, "to_dict", lambda event: made.append(event) or {})
    shared = SharedFrames(size=2)
    first, second, third = map(resolving, range(3))
    for event in (first, first, second, first, third, second, first):
        shared(event)
    assert made == [first, second, third, first]  # the third one pushed the first one out
    assert len(shared._frames) == 2


def test_equal_events_are_not_confused_with_one_that_has_gone():
    shared = SharedFrames(size=1)
    assert len({shared(resolving(seq)) for seq in range(100)}) == 100
