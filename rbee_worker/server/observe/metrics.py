"""``GET /metrics``: the worker's figures at the moment of the scrape, in Prometheus' text format.

Most figures are read from the worker at the scrape. So the page works from the start, also during a load, and costs
nothing between scrapes. Figures of requests are counted while these run (``figures.py``). Names begin with ``rbee_``
and end in their unit. If vLLM has the same figure, the rest of the name is vLLM's.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from rbee_worker import __version__
from rbee_worker.log import lines_dropped
from rbee_worker.runtime.engine.stats import EngineStats
from rbee_worker.runtime.machine.devices import MIB, DeviceInfo, peak_host_bytes
from rbee_worker.server.observe.figures import BATCHES, Histogram, JobFigures
from rbee_worker.worker.broadcast import LoadingBroadcast
from rbee_worker.worker.worker import STATES, Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class WorkerMetrics(Collector):
    """Reads a worker's figures at a scrape, and counts its HTTP responses. To be used only on the event loop.

    Args:
        worker: the worker; an observer is added to its jobs.
        by_client: whether to count requests and tokens for each client too.
    """

    def __init__(self, worker: Worker, *, by_client: bool = False) -> None:
        self._worker = worker
        self._jobs = JobFigures(by_client=by_client)
        worker.jobs.observers.append(self._jobs)
        self._responses: Counter[tuple[str, str, int]] = Counter()
        self._devices: Sequence[DeviceInfo] = ()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def responded(self, method: str, route: str, status: int) -> None:
        """Count an HTTP response. ``route`` is the route's pattern: the number of paths would have no limit."""
        self._responses[method, route, status] += 1

    def render(self, devices: Sequence[DeviceInfo] = ()) -> bytes:
        """The page in UTF-8, with the memory of ``devices``."""
        self._devices = devices
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """All figures. The Prometheus client calls this."""
        worker, loads, model = self._worker, self._worker.loads, self._worker.engine.model
        name = model.name if model is not None else ""
        yield InfoMetricFamily("rbee_worker", "The worker.", {"id": worker.id, "version": __version__, "model": name})
        state = GaugeMetricFamily("rbee_state", "1 for the worker's state, 0 for the others.", labels=["state"])
        for word in STATES:
            state.add_metric([word], float(worker.state == word))
        yield state
        yield _gauge("rbee_uptime_seconds", "Seconds since the worker started.", worker.uptime_seconds)
        responses = CounterMetricFamily(
            "rbee_http_requests", "HTTP requests answered.", labels=["method", "route", "status"]
        )
        for (method, route, status), count in self._responses.items():
            responses.add_metric([method, route, str(status)], count)
        yield responses
        yield _counter("rbee_log_lines_dropped", "Log lines lost because stderr took none.", lines_dropped())
        yield _gauge("rbee_requests_running", "Requests with a place in the batch.", worker.jobs.running)
        yield _gauge("rbee_requests_waiting", "Requests waiting for a place.", worker.jobs.queued)
        yield from self._jobs.collect()
        yield from _engine(worker.engine.stats)
        yield from _memory(self._devices)
        yield _gauge("rbee_weights_bytes", "Bytes of weights on the devices, a load's included.", worker.vram_bytes)
        yield _gauge("rbee_host_peak_memory_bytes", "The process's peak resident memory.", peak_host_bytes())
        ended = CounterMetricFamily("rbee_loads", "Loads that have ended, by outcome.", labels=["outcome"])
        for outcome in ("ready", "error", "cancelled"):
            ended.add_metric([outcome], loads.outcomes[outcome])
        yield ended
        watchers = loads.broadcast.subscribers if loads.broadcast is not None else 0
        yield _gauge("rbee_load_watchers", "Subscribers of the load's progress.", watchers)
        if loads.broadcast is not None:
            yield from _load(loads.broadcast)


def _engine(stats: EngineStats) -> Iterator[Metric]:
    """Figures of steps, tokens and the KV cache."""
    batches = Histogram("rbee_batch_size", "Sequences in a step.", BATCHES)
    for size, steps in enumerate(stats.batch_sizes):
        batches.add(size, steps)
    yield batches.family()
    yield _counter("rbee_engine_steps", "Forward passes.", stats.steps)
    yield _counter("rbee_generation_tokens", "Tokens generated.", stats.generated_tokens)
    yield _counter("rbee_speculation_drafted_tokens", "Tokens that were guessed.", stats.drafted_tokens)
    yield _counter("rbee_speculation_accepted_tokens", "Tokens that were guessed right.", stats.accepted_tokens)
    yield _counter("rbee_prefill_tokens", "Prompt tokens computed.", stats.prefilled_tokens)
    yield _counter("rbee_preemptions", "Sequences that had to give their place up.", stats.preemptions)
    yield _counter("rbee_prefix_cache_queries", "Prompt tokens looked up for reuse.", stats.prefix_query_tokens)
    yield _counter("rbee_prefix_cache_hits", "Prompt tokens reused.", stats.prefix_hit_tokens)
    used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    yield _gauge("rbee_kv_cache_usage_ratio", "Share of the KV cache that running requests hold.", used)
    blocks = GaugeMetricFamily("rbee_kv_cache_blocks", "Blocks of the KV cache.", labels=["state"])
    free = stats.kv_blocks_total - stats.kv_blocks_used - stats.kv_blocks_cached
    for state, count in (("used", stats.kv_blocks_used), ("cached", stats.kv_blocks_cached), ("free", free)):
        blocks.add_metric([state], count)
    yield blocks
    yield _gauge("rbee_kv_cache_block_tokens", "Tokens that a block holds.", stats.block_tokens)


def _memory(devices: Sequence[DeviceInfo]) -> Iterator[Metric]:
    used = GaugeMetricFamily("rbee_device_memory_used_bytes", "Memory that all processes use.", labels=["device"])
    size = GaugeMetricFamily("rbee_device_memory_size_bytes", "Memory that the device has.", labels=["device"])
    for device in devices:
        used.add_metric([device.name], device.used_bytes)
        size.add_metric([device.name], device.total_bytes)
    yield used
    yield size


def _load(load: LoadingBroadcast) -> Iterator[Metric]:
    """Figures of the latest load, running or ended."""
    phase = GaugeMetricFamily("rbee_load_phase_seconds", "Seconds in each phase of the load.", labels=["phase"])
    for name, seconds in load.phase_seconds.items():
        phase.add_metric([name], seconds)
    yield phase
    stage = load.latest.stage if load.latest is not None else "resolving"
    current = GaugeMetricFamily("rbee_load_stage", "1 for the stage the load is in or ended with.", labels=["stage"])
    current.add_metric([stage], 1)
    yield current
    yield CounterMetricFamily("rbee_load_stalls", "Times that the load has stalled.", value=load.stalls)
    counts = load.latest_counts
    if counts is None:
        return
    yield _gauge("rbee_load_read_bytes", "Bytes of the model's files read.", counts.bytes_loaded)
    yield _gauge("rbee_load_total_bytes", "Bytes of the model's files.", counts.bytes_total)
    yield _gauge("rbee_load_bytes_per_second", "Mean rate of reading.", counts.bytes_per_second)
    for name, text, value in (
        ("rbee_load_layers_loaded", "Decoder layers that are resident.", counts.layers_loaded),
        ("rbee_load_layers", "Decoder layers of the model.", counts.layers_total),
        ("rbee_load_device_memory_bytes", "Memory that the load's weights hold.", counts.vram_mb * MIB),
    ):
        family = GaugeMetricFamily(name, text, labels=["device"])
        family.add_metric([counts.device], value)
        yield family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
