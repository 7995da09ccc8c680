"""``GET /metrics``: the worker's state at the moment of the scrape, in Prometheus' text format.

Nothing is counted here: every figure is read from the worker when it is asked for, so that the page is there from the
first moment, during a load too, and costs nothing between scrapes. Names begin with ``rbee_`` and end in their unit.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from rbee_worker import __version__
from rbee_worker.broadcast import LoadingBroadcast
from rbee_worker.runtime.memory import MIB, peak_host_bytes
from rbee_worker.worker import STATES, Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class WorkerMetrics(Collector):
    """Reads a worker's figures when they are scraped."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Every figure."""
        worker = self._worker
        yield InfoMetricFamily(
            "rbee_worker", "The worker.", {"id": worker.id, "version": __version__, "model": worker.model_name or ""}
        )
        state = GaugeMetricFamily("rbee_state", "1 for the worker's state, 0 for the others.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(worker.state == name))
        yield state
        yield _gauge("rbee_uptime_seconds", "Seconds since the worker started.", worker.uptime_seconds)
        yield _gauge("rbee_requests_running", "Requests with a place in the batch.", worker.running)
        yield _gauge("rbee_requests_waiting", "Requests waiting for a place.", worker.queued)
        yield _gauge("rbee_weights_bytes", "Bytes of weights on the devices, a load's included.", worker.vram_bytes)
        yield _gauge("rbee_host_peak_memory_bytes", "The process's peak resident memory.", peak_host_bytes())
        loads = CounterMetricFamily("rbee_loads", "Loads that have ended, by outcome.", labels=["outcome"])
        for outcome in ("ready", "error", "cancelled"):
            loads.add_metric([outcome], worker.load_outcomes[outcome])
        yield loads
        yield _gauge("rbee_load_watchers", "Subscribers of the load's progress.", worker.watchers)
        if worker.broadcast is not None:
            yield from _load(worker.broadcast)


def _load(load: LoadingBroadcast) -> Iterator[Metric]:
    """The latest load, running or ended."""
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
        ("rbee_load_layers_total", "Decoder layers of the model.", counts.layers_total),
        ("rbee_load_device_memory_bytes", "Memory that the load's weights hold.", counts.vram_mb * MIB),
    ):
        family = GaugeMetricFamily(name, text, labels=["device"])
        family.add_metric([counts.device], value)
        yield family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
