"""``bench serve``: arrivals and percentiles as figures say, and failures of a worker that is played."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path

import pytest

from rbee_worker.cli.bench import serve
from rbee_worker.cli.bench.serve import Answer, Load
from tests.unit.cli.harness import run
from tests.unit.fake_worker import FakeWorker, frames, refused, stream
from tests.unit.samples import JOB

ASK = "POST /v1/inference"


def in_turn(*answers: Callable[..., None]) -> Callable[..., None]:
    """The first answer to the first request, and so on."""
    left = iter(answers)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        next(left)(handler)

    return answer


def test_a_seed_gives_the_same_arrivals_and_every_round_others() -> None:
    load = Load(rate=5, requests=2000, prompt_words=64, max_tokens=8, seed=1)
    first, again, second = (list(load.arrivals(number)) for number in (0, 0, 1))
    assert first == again != second
    dues, words = zip(*first, strict=True)
    assert list(dues) == sorted(dues)
    assert dues[-1] / 2000 == pytest.approx(1 / 5, rel=0.1)
    gaps = [after - before for before, after in pairwise(dues)]
    # Of a Poisson process the gaps spread as wide as they are long.
    assert sum(gap < 1 / 5 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.05)
    assert (min(words), max(words)) == (4, 64)
    assert sum(count < 16 for count in words) / 2000 == pytest.approx(0.5, abs=0.05)


def test_no_prompt_is_sent_twice() -> None:
    load = Load(rate=5, requests=1, prompt_words=64, max_tokens=8, seed=1)
    prompts = [load.request(9).prompt or "" for _ in range(20)]
    assert len({prompt.split()[0] for prompt in prompts}) == 20
    assert {len(prompt.split()) for prompt in prompts} == {9}


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (90, 90), (99, 99)])
def test_a_percentile_of_a_hundred_is_itself(percent: int, value: int) -> None:
    assert serve.percentile(range(100, 0, -1), percent) == value
    assert serve.percentile([7], percent) == 7


def test_times_begin_when_a_request_was_due() -> None:
    answers = [
        Answer(due=10.0, sent=10.0, tokens=[11.0, 11.5, 13.0], end=13.0, made=3, prompt=5),
        Answer(due=12.0, sent=12.125, tokens=[12.25], end=14.0, made=1, prompt=1),
        Answer(due=13.0, sent=13.0, end=20.0, failure="QUEUE_FULL"),
    ]
    told = serve.figures(answers)
    assert told == {
        "first_token_p50_ms": 250, "first_token_p90_ms": 1000, "first_token_p99_ms": 1000,
        "between_tokens_p50_ms": 500, "between_tokens_p90_ms": 1500, "between_tokens_p99_ms": 1500,
        "end_to_end_p50_ms": 2000, "end_to_end_p90_ms": 3000, "end_to_end_p99_ms": 3000,
        "sent_late_p99_ms": 125,
        "output_tok_s": 0.4, "prompt_tok_s": 0.6, "requests_per_s": 0.2, "failed": 1,
    }  # fmt: skip
    assert serve.figures(answers[2:]).keys() == {
        "sent_late_p99_ms", "output_tok_s", "prompt_tok_s", "requests_per_s", "failed"
    }  # fmt: skip


def test_failures_are_counted_by_their_code(worker: FakeWorker) -> None:
    whole = stream(frames(*JOB))
    worker.answers[ASK] = in_turn(whole, whole, refused(429, "QUEUE_FULL", "full"), stream("data: {}\n\n"), whole)
    done = run("bench", "serve", "--addr", worker.addr, "--requests", "4", "--rate", "5", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["failures"] == {"QUEUE_FULL": 1, "WORKER_UNREACHABLE": 1}
    assert told["figures"]["failed"]["median"] == 2
    assert told["figures"]["end_to_end_p50_ms"]["median"] > 0


def test_no_answer_at_all_is_an_error_after_the_result(worker: FakeWorker) -> None:
    full = refused(429, "QUEUE_FULL", "full")
    worker.answers[ASK] = in_turn(stream(frames(*JOB)), full, full)
    done = run("bench", "serve", "--addr", worker.addr, "--requests", "2", "--rate", "100")
    assert done.exit_code == 1
    assert "failed with QUEUE_FULL: 2" in done.stdout
    assert "No request was answered: QUEUE_FULL" in done.stderr


def test_a_worker_that_refuses_or_is_not_there_is_said_at_once(worker: FakeWorker, tmp_path: Path) -> None:
    worker.answers[ASK] = refused(503, "UNAVAILABLE", "loading")
    done = run("bench", "serve", "--addr", worker.addr)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "loading" in done.stderr
    assert len(worker.calls) == 1
    done = run("bench", "serve", "--addr", "127.0.0.1:1")
    assert (done.exit_code, done.stdout) == (6, "")
    before = tmp_path / "before.json"
    before.write_text('{"bench": "decode"}')
    done = run("bench", "serve", "--addr", worker.addr, "--compare", str(before))
    assert done.exit_code == 2
    assert "a result of bench decode, not of bench serve" in done.stderr
    assert len(worker.calls) == 1
