"""Jobs: when what happened, and who is told."""

import asyncio

import pytest

from rbee_worker.config import GenerationRequest
from rbee_worker.errors import Conflict
from rbee_worker.events import InferenceFailed, Token
from rbee_worker.worker.job import Job, note_submitted, submitted_jobs
from rbee_worker.worker.jobs import Jobs
from tests.unit.samples import JOB

STARTED, *_, END = JOB


class Told:
    """Notes what it is told."""

    def __init__(self):
        self.calls = []

    def stepped(self, gaps):
        self.calls.append(("stepped", len(gaps)))

    def started(self, job):
        self.calls.append(("started", job.id))

    def ended(self, job):
        self.calls.append(("ended", job.id))


def job(name="a"):
    return Job(name, lambda _: None, GenerationRequest(prompt="p"))


def register(*taken):
    """These jobs and no room for more."""
    jobs = Jobs(len(taken))
    jobs.register(list(taken))
    return jobs


def text(i):
    return Token(t="x", i=i)


def test_a_job_knows_when_what_happened():
    one = job()
    assert (one.started, one.ended, one.first_at, one.texts) == (None, None, 0.0, 0)
    submitted = one.submitted_at
    for now, event in enumerate([STARTED, text(0), text(1), END], start=1):
        one.put(event, submitted + now)
    assert (one.started, one.ended) == (STARTED, END)
    times = [one.started_at, one.first_at, one.last_at, one.ended_at]
    assert [round(at - submitted) for at in times] == [1, 2, 3, 4]
    assert one.texts == 2


def test_a_failure_is_an_end():
    one = job()
    failure = InferenceFailed(code="INFERENCE_FAILED", message="m")
    jobs = register(one)
    jobs.deliver([("a", failure)], 0)
    assert one.ended is failure
    assert len(jobs) == 0


def test_observers_are_told_once_for_a_step_and_once_for_a_job():
    told, jobs = Told(), register(job("a"), job("b"))
    jobs.observers.append(told)
    jobs.deliver([(name, event) for name in jobs for event in (STARTED, text(0), text(1))], 2)
    assert list(jobs) == ["a", "b"]
    assert told.calls == [("started", "a"), ("started", "b")]
    told.calls.clear()
    # Two tokens of one step arrive together: one gap for each job.
    step = [("a", text(2)), ("a", text(3)), ("b", text(2)), ("a", END), ("gone", text(9))]
    jobs.deliver(step, 1)
    assert list(jobs) == ["b"]
    assert told.calls == [("ended", "a"), ("stepped", 2)]


class Failing(Told):
    """Cannot take anything."""

    def stepped(self, gaps):
        raise RuntimeError(gaps)

    def started(self, job):
        raise RuntimeError(job)

    def ended(self, job):
        raise RuntimeError(job)


def test_an_observer_that_fails_costs_nobody_else_their_events(caplog):
    one, other, told = job("a"), job("b"), Told()
    jobs = register(one, other)
    jobs.observers[:] = [Failing(), told]
    jobs.deliver([(name, event) for name in ("a", "b") for event in (STARTED, text(0))], 2)
    jobs.deliver([("a", text(1)), ("a", END), ("b", text(1)), ("b", END)], 0)
    assert told.calls == [("started", "a"), ("started", "b"), ("ended", "a"), ("ended", "b"), ("stepped", 2)]
    assert (one.ended, other.ended, len(jobs)) == (END, END, 0)
    assert caplog.messages == ["an observer of jobs failed: Failing"] * 5


def test_leaving_a_job_that_has_ended_cancels_no_other_of_its_name():
    cancelled = []
    one = Job("a", cancelled.append, GenerationRequest(prompt="p"))
    register(one).deliver([("a", STARTED), ("a", END)], 0)
    one.cancel()
    asyncio.run(one.aclose())
    assert cancelled == []


def test_two_jobs_of_one_name_are_refused_together():
    jobs = Jobs(8)
    with pytest.raises(Conflict, match="Job a is running already"):
        jobs.register([job("a"), job("a")])
    assert len(jobs) == 0


def test_events_still_reach_the_consumer():
    async def consume():
        one = job()
        register(one).deliver([("a", event) for event in JOB], 0)
        return [event async for event in one]

    assert asyncio.run(consume()) == list(JOB)


def test_jobs_are_noted_where_someone_asks():
    note_submitted([job()])  # nobody does
    noted = []
    token = submitted_jobs.set(noted)
    try:
        one = job()
        note_submitted([one])
    finally:
        submitted_jobs.reset(token)
    assert noted == [one]
