"""When to ask again: from what runs, and how long others have run."""

import uuid

import pytest

from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.worker.job import Job
from rbee_worker.worker.pace import Pace


def job(began: float, *, max_tokens: int | None = None) -> Job:
    sampling = SamplingParams(max_tokens=max_tokens)
    made = Job(str(uuid.uuid4()), lambda _: None, GenerationRequest(prompt="x", sampling=sampling))
    made.started_at = began
    return made


def run(pace: Pace, began: float, ended: float | None = None) -> None:
    one = job(began)
    pace.started(one)
    if ended is not None:
        one.ended_at = ended
        pace.ended(one)


@pytest.mark.parametrize(
    ("ended", "running", "now", "seconds"),
    [
        ([], [], 100.0, 1),  # nothing is known
        ([], [90.0, 95.0], 100.0, 5),  # as long again as the latest has run
        ([], [0.0], 100.0, 60),
        ([30.0, 10.0], [90.0], 100.0, 10),  # 20 on the mean, 10 of it over
        ([30.0, 10.0], [90.0, 85.0], 100.0, 5),
        ([0.1], [90.0] * 4, 100.0, 10),  # short ones before say little of long ones now
        ([900.0], [90.0], 100.0, 60),
    ],
)
def test_seconds_to_room(ended: list[float], running: list[float], now: float, seconds: int):
    pace = Pace()
    for length in ended:
        run(pace, 0.0, length)
    for began in running:
        run(pace, began)
    assert pace.seconds_to_room(now) == seconds


def test_a_job_with_a_last_token_runs_to_it_at_the_rate_it_has():
    pace = Pace()
    run(pace, 0.0, 0.1)
    one = job(90.0, max_tokens=101)
    one.texts, one.first_at, one.last_at = 51, 90.5, 100.5
    pace.started(one)
    assert pace.seconds_to_room(100.6) == 10


def test_only_the_latest_count_and_an_idle_hour_does_not():
    pace = Pace()
    for _ in range(40):
        run(pace, 0.0, 50.0)
    for n in range(32):
        run(pace, 3600.0 + n, 3602.0 + n)
    run(pace, 9000.0)
    assert pace.seconds_to_room(9000.5) == 2


def test_a_job_that_never_ran_says_nothing():
    pace = Pace()
    pace.ended(job(0.0))
    run(pace, 10.0)
    assert pace.seconds_to_room(13.0) == 3
