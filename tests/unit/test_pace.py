"""When to ask again: from how long jobs have run."""

import uuid
from types import SimpleNamespace

import pytest

from rbee_worker.pace import Pace


def run(pace: Pace, began: float, ended: float | None = None) -> None:
    job = SimpleNamespace(id=str(uuid.uuid4()), started_at=began, ended_at=ended)
    pace.started(job)  # type: ignore[arg-type]
    if ended is not None:
        pace.ended(job)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ended", "running", "now", "seconds"),
    [
        ([], [], 100.0, 1),  # nothing is known
        ([], [90.0, 95.0], 100.0, 10),
        ([], [0.0], 100.0, 60),
        ([30.0, 10.0], [90.0], 100.0, 20),
        ([30.0, 10.0], [90.0] * 4, 100.0, 5),
        ([0.1], [90.0] * 4, 100.0, 1),
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
    pace.ended(SimpleNamespace(id="x", ended_at=50.0))  # type: ignore[arg-type]
    run(pace, 10.0)
    assert pace.seconds_to_room(13.0) == 3
