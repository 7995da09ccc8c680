"""Counts jobs for ``GET /metrics``: once a step and once a job. It runs on the event loop, so it needs no lock."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from rbee_worker.events import End
from rbee_worker.worker.job import Job

STEP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Bounds for the time of a token. A large GPU needs a few milliseconds, a small CPU a few hundred."""

WAIT_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Bounds for the times that a client waits: first token, queue, prefill, the whole answer."""

RATES: Final = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 2.5e4, 5e4)
"""Bounds for tokens a second."""

TOKENS: Final = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)
"""Bounds for the lengths of prompts and answers."""

BATCHES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Bounds for the number of sequences in a step."""


class Histogram:
    """Counts values in buckets. A value that equals a bound belongs to its bucket, as in Prometheus."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count ``value``, ``times`` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self) -> Metric:
        """The histogram as Prometheus' samples."""
        names = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric([], list(zip(names, accumulate(self._counts), strict=True)), self._sum)
        return family


class JobFigures:
    """Counts a worker's jobs, as an observer of them.

    Args:
        by_client: whether to count requests and tokens for each client too. The number of clients must be bounded.
    """

    def __init__(self, *, by_client: bool = False) -> None:
        self._by_client = by_client
        self._outcomes: Counter[str] = Counter()
        self._prompt_tokens = 0
        self._client_requests: Counter[str] = Counter()
        self._client_tokens: Counter[tuple[str, str]] = Counter()
        self._first_token = Histogram(
            "rbee_time_to_first_token_seconds", "From submission to the first text.", WAIT_SECONDS
        )
        self._gap = Histogram(
            "rbee_inter_token_latency_seconds", "Between two deliveries of text to a request.", STEP_SECONDS
        )
        self._per_token = Histogram(
            "rbee_time_per_output_token_seconds", "Mean time of a request's tokens after the first.", STEP_SECONDS
        )
        self._whole = Histogram("rbee_e2e_request_latency_seconds", "From submission to the end.", WAIT_SECONDS)
        self._queue = Histogram(
            "rbee_request_queue_time_seconds", "From submission to a place in the batch.", WAIT_SECONDS
        )
        self._prefill = Histogram(
            "rbee_request_prefill_time_seconds", "From a place in the batch to the first token.", WAIT_SECONDS
        )
        self._decode = Histogram("rbee_request_decode_time_seconds", "From the first token to the last.", WAIT_SECONDS)
        self._prefill_rate = Histogram(
            "rbee_request_prefill_tokens_per_second", "Prompt tokens computed over the time to the first.", RATES
        )
        self._decode_rate = Histogram(
            "rbee_request_decode_tokens_per_second", "Tokens after the first over their time.", RATES
        )
        self._prompt_length = Histogram("rbee_request_prompt_tokens", "Length of a prompt.", TOKENS)
        self._answer_length = Histogram("rbee_request_generation_tokens", "Length of an answer.", TOKENS)

    def stepped(self, gaps: list[float]) -> None:
        """Count a step. ``gaps``: for each job that got text, the seconds since its text before."""
        for seconds in gaps:
            self._gap.add(seconds)

    def started(self, job: Job) -> None:
        """Count a job that got its place in the batch."""
        self._queue.add(job.started_at - job.submitted_at)
        if job.started is not None:
            self._prompt_tokens += job.started.prompt_tokens
            self._prompt_length.add(job.started.prompt_tokens)

    def ended(self, job: Job) -> None:
        """Count a job that has ended."""
        end = job.ended
        self._outcomes[end.stop_reason if isinstance(end, End) else "error"] += 1
        self._whole.add(job.ended_at - job.submitted_at)
        if job.first_at:
            self._first_token.add(job.first_at - job.submitted_at)
        if isinstance(end, End):
            self._count(end)
        if self._by_client:
            self._client_requests[job.request.client] += 1
            if isinstance(end, End):
                self._client_tokens[job.request.client, "prompt"] += end.prompt_tokens
                self._client_tokens[job.request.client, "generation"] += end.tokens_out

    def _count(self, end: End) -> None:
        self._answer_length.add(end.tokens_out)
        if end.tokens_out == 0:
            return
        prefill, decode = end.prefill_time_ms / 1000, end.decode_time_ms / 1000
        self._prefill.add(prefill)
        self._decode.add(decode)
        if prefill > 0:
            self._prefill_rate.add((end.prompt_tokens - end.cached_tokens) / prefill)
        if end.tokens_out > 1 and decode > 0:
            self._per_token.add(decode / (end.tokens_out - 1))
            self._decode_rate.add(end.tokens_per_second)

    def collect(self) -> Iterator[Metric]:
        """All figures of jobs."""
        outcomes = CounterMetricFamily("rbee_requests", "Requests that have ended, by why.", labels=["stop_reason"])
        for reason in OUTCOMES:
            outcomes.add_metric([reason], self._outcomes[reason])
        yield outcomes
        yield CounterMetricFamily("rbee_prompt_tokens", "Tokens of prompts.", value=self._prompt_tokens)
        for histogram in (
            self._first_token,
            self._gap,
            self._per_token,
            self._whole,
            self._queue,
            self._prefill,
            self._decode,
            self._prefill_rate,
            self._decode_rate,
            self._prompt_length,
            self._answer_length,
        ):
            yield histogram.family()
        if self._by_client:
            yield from self._clients()

    def _clients(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("rbee_client_requests", "Requests that have ended, by key.", labels=["client"])
        for client, count in self._client_requests.items():
            requests.add_metric([client], count)
        yield requests
        tokens = CounterMetricFamily(
            "rbee_client_tokens", "Tokens of prompts and answers, by key.", labels=["client", "kind"]
        )
        for (client, kind), count in self._client_tokens.items():
            tokens.add_metric([client, kind], count)
        yield tokens


OUTCOMES: Final = ("eos", "max_tokens", "stop_sequence", "context_full", "cancelled", "error")
"""Values of ``stop_reason``: those of ``end`` events, and ``error``."""
