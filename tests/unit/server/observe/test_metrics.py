"""``/metrics``: what is counted of requests, and what the page says of the engine and the devices."""

import re
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rbee_worker.config import GenerationRequest
from rbee_worker.events import End, InferenceFailed, Token
from rbee_worker.runtime.engine.stats import EngineStats
from rbee_worker.server.observe.figures import OUTCOMES, Histogram, JobFigures
from rbee_worker.server.observe.metrics import WorkerMetrics
from rbee_worker.worker.broadcast import LoadingBroadcast
from rbee_worker.worker.job import Job
from rbee_worker.worker.jobs import Jobs
from tests.unit.samples import LOAD


def samples(page):
    """The page's samples: name and labels, as they are written -> value."""
    text = page if isinstance(page, str) else page.decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


def run(figures, *events, client="", at=()):
    """A job that was submitted at 100 s and had ``events`` at the seconds ``at`` after that."""
    job = Job("j", lambda _: None, GenerationRequest(prompt="p", client=client))
    job.submitted_at = 100.0
    for event, seconds in zip(events, at, strict=True):
        job.put(event, 100.0 + seconds)
        if event is events[0] and event.event == "started":
            figures.started(job)
    figures.ended(job)


def finished(tokens=5, reason="eos", *, prompt=30, cached=10, prefill=400, decode=2000):
    return End(
        tokens_out=tokens,
        decode_time_ms=decode,
        stop_reason=reason,
        prompt_tokens=prompt,
        cached_tokens=cached,
        prefill_time_ms=prefill,
        tokens_per_second=round((tokens - 1) / (decode / 1000), 2) if decode else 0.0,
    )


@pytest.fixture
def page(stand_in):
    """A worker that only stands in, and how to read its page."""
    worker = stand_in.Worker()
    metrics = WorkerMetrics(worker)
    return SimpleNamespace(
        worker=worker,
        metrics=metrics,
        figures=worker.jobs.observers[0],
        read=lambda: samples(metrics.render(worker.memory())),
    )


def test_names_follow_the_conventions_of_prometheus(page):
    worker = page.worker
    worker.loads.broadcast = LoadingBroadcast()
    for event in LOAD:
        worker.loads.broadcast.publish(event)
    for family in page.metrics.collect():
        # A suffix that says "counter", or that a kind adds by itself, misleads whoever reads the name alone.
        assert not re.search(r"_(total|count|sum|bucket|info)$", family.name), family.name
        assert re.fullmatch(r"rbee_[a-z][a-z0-9_]*", family.name), family.name
        assert family.documentation.endswith("."), family.name


def test_a_histogram_counts_cumulatively_and_bounds_belong_to_their_bucket():
    histogram = Histogram("h", "text", (1.0, 2.5, 5.0))
    for value in (0.5, 1.0, 1.1, 2.5, 9.0):
        histogram.add(value)
    histogram.add(3.0, times=2)
    (family,) = [histogram.family()]
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name == "h_bucket"}
    assert buckets == {"1": 2, "2.5": 4, "5": 6, "+Inf": 7}
    assert next(s.value for s in family.samples if s.name == "h_sum") == pytest.approx(20.1)
    assert next(s.value for s in family.samples if s.name == "h_count") == 7


def test_the_times_of_a_request(page, stand_in):
    run(page.figures, stand_in.started(), Token(t="x", i=0), finished(), at=(0.2, 0.7, 3.0))
    found = page.read()
    for name, value in {
        "rbee_request_queue_time_seconds_sum": 0.2,
        "rbee_time_to_first_token_seconds_sum": 0.7,
        "rbee_e2e_request_latency_seconds_sum": 3.0,
        "rbee_request_prefill_time_seconds_sum": 0.4,
        "rbee_request_decode_time_seconds_sum": 2.0,
        "rbee_time_per_output_token_seconds_sum": 0.5,
        "rbee_request_prefill_tokens_per_second_sum": 50.0,
        "rbee_request_decode_tokens_per_second_sum": 2.0,
        "rbee_request_prompt_tokens_sum": 1.0,
        "rbee_request_generation_tokens_sum": 5.0,
        "rbee_prompt_tokens_total": 1.0,
        'rbee_requests_total{stop_reason="eos"}': 1.0,
    }.items():
        assert found[name] == pytest.approx(value), name
        if name.endswith("_sum"):
            assert found[name.removesuffix("_sum") + "_count"] == 1


def test_every_end_is_an_outcome(page):
    failure = InferenceFailed(code="INFERENCE_FAILED", message="m")
    run(page.figures, failure, at=(1.0,))
    run(page.figures, finished(0, "cancelled", decode=0, prefill=0), at=(1.0,))
    found = page.read()
    assert {reason: found[f'rbee_requests_total{{stop_reason="{reason}"}}'] for reason in OUTCOMES} == {
        **dict.fromkeys(OUTCOMES, 0.0),
        "error": 1.0,
        "cancelled": 1.0,
    }
    assert found["rbee_e2e_request_latency_seconds_count"] == 2
    assert found["rbee_time_to_first_token_seconds_count"] == 0  # there was none
    assert found["rbee_request_prefill_tokens_per_second_count"] == 0


def test_gaps_are_counted_as_they_come(page):
    jobs = Jobs(1)
    jobs.register([Job("j", lambda _: None, GenerationRequest(prompt="p"))])
    jobs.observers += page.worker.jobs.observers
    for i in range(3):
        jobs.deliver([("j", Token(t="x", i=2 * i)), ("j", Token(t="x", i=2 * i + 1))], 1)
    assert page.read()["rbee_inter_token_latency_seconds_count"] == 2


def test_clients_are_counted_where_they_have_keys(stand_in):
    figures = JobFigures(by_client=True)
    for client in ("alice", "alice", "key-1"):
        run(figures, stand_in.started(), finished(), client=client, at=(1.0, 2.0))
    found = {(s.name, *s.labels.values()): s.value for family in figures.collect() for s in family.samples}
    assert found["rbee_client_requests_total", "alice"] == 2
    assert found["rbee_client_tokens_total", "alice", "prompt"] == 60
    assert found["rbee_client_tokens_total", "key-1", "generation"] == 5


def test_without_keys_clients_are_not_counted(page):
    run(page.figures, finished(), client="192.0.2.1", at=(1.0,))
    assert not any("client" in name for name in page.read())


def test_the_engine_and_the_devices(page):
    page.worker.engine.stats = EngineStats(
        steps=7,
        batch_sizes=(0, 4, 2, 1),
        prefilled_tokens=20,
        generated_tokens=9,
        drafted_tokens=6,
        accepted_tokens=5,
        preemptions=1,
        prefix_query_tokens=40,
        prefix_hit_tokens=16,
        kv_blocks_total=10,
        kv_blocks_used=4,
        kv_blocks_cached=1,
        block_tokens=16,
    )
    found = page.read()
    for name, value in {
        "rbee_engine_steps_total": 7,
        'rbee_batch_size_bucket{le="1"}': 4,
        'rbee_batch_size_bucket{le="2"}': 6,
        'rbee_batch_size_bucket{le="4"}': 7,
        "rbee_batch_size_sum": 11,
        "rbee_prefill_tokens_total": 20,
        "rbee_generation_tokens_total": 9,
        "rbee_speculation_drafted_tokens_total": 6,
        "rbee_speculation_accepted_tokens_total": 5,
        "rbee_preemptions_total": 1,
        "rbee_prefix_cache_queries_total": 40,
        "rbee_prefix_cache_hits_total": 16,
        "rbee_kv_cache_usage_ratio": 0.4,
        'rbee_kv_cache_blocks{state="free"}': 5,
        "rbee_kv_cache_block_tokens": 16,
        'rbee_device_memory_used_bytes{device="cpu"}': 60,
        'rbee_device_memory_size_bytes{device="cpu"}': 100,
    }.items():
        assert found[name] == value, name


def test_the_page_is_well_formed_and_every_metric_has_its_help(page):
    families = list(text_string_to_metric_families(page.metrics.render().decode()))
    assert len(families) > 30
    for family in families:
        assert family.name.startswith("rbee_"), family.name
        assert family.documentation.endswith("."), family.name
        assert family.type != "unknown", family.name


def test_responses_are_counted_by_route(start):
    server = start()
    server.ask("GET", "/livez")
    server.ask("DELETE", "/v1/inference/a%20b")
    server.ask("DELETE", "/v1/inference/c")
    server.ask("PUT", "/v1/loading")
    server.ask("GET", "/no/such/route")
    server.raw(b"BREW /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    wanted = {
        ("GET", "/livez", "200"): 1,
        ("DELETE", "/v1/inference/{job_id}", "204"): 2,
        ("PUT", "/v1/loading", "405"): 1,
        ("GET", "other", "404"): 1,
        ("other", "/livez", "405"): 1,
    }
    names = {
        f'rbee_http_requests_total{{method="{method}",route="{route}",status="{status}"}}': count
        for (method, route, status), count in wanted.items()
    }
    server.wait(lambda: names.items() <= samples(server.ask("GET", "/metrics").body).items())


def test_a_refused_request_counts_for_its_route(start):
    server = start(api_keys=("k",))
    server.ask("POST", "/v1/unload")
    name = 'rbee_http_requests_total{method="POST",route="/v1/unload",status="401"}'
    key = {"Authorization": "Bearer k"}
    server.wait(lambda: samples(server.ask("GET", "/metrics", None, key).body).get(name) == 1)
