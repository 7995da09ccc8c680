"""The worker on a random tiny model, driven from an event loop as the server drives it."""

import asyncio
import gc
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.errors import (
    Conflict,
    InferenceError,
    InvalidRequest,
    ModelNotLoaded,
    OutOfMemory,
    QueueFull,
    Unavailable,
)
from rbee_worker.events import (
    End,
    InferenceEvent,
    InferenceFailed,
    LoadCancelled,
    LoadFailed,
    LoadingEvent,
    Ready,
    Token,
)
from rbee_worker.runtime.engine.prepare import prepare
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.loading import load as load_module
from rbee_worker.runtime.loading import plan as plan_module
from rbee_worker.runtime.loading.load import LoadedModel
from rbee_worker.runtime.loading.plan import LoadPlan, plan_local
from rbee_worker.runtime.source import ModelSource
from rbee_worker.worker.engine_thread import EngineThread
from rbee_worker.worker.history import KEPT_LOADS
from rbee_worker.worker.worker import Job, Worker
from tests.tiny import CONFIG, write_tiny_model

Body = Callable[[Worker], Awaitable[None]]

BYTES_OF_224_TOKENS = 224 * CONFIG["num_hidden_layers"] * 2 * CONFIG["num_key_value_heads"] * 16 * 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def with_worker(body: Body, *, max_queue: int = 64, **config: int) -> None:
    """Run ``body`` with a started worker, and check that it leaves no thread."""

    async def main() -> None:
        worker = Worker(EngineConfig(device="cpu", dtype="float32", **config), max_queue=max_queue)
        worker.start()
        try:
            await asyncio.wait_for(body(worker), 60)
        finally:
            await worker.close()

    asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name in {"engine", "loader"}]


def request(job_id: str | None = None, **sampling: object) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": 10, "ignore_eos": True} | sampling)
    return GenerationRequest(prompt="hello", job_id=job_id, sampling=params)


async def load(worker: Worker, model: str) -> list[LoadingEvent]:
    worker.loads.begin(model)
    return [event async for event in worker.loads.progress()]


def unload(worker: Worker) -> asyncio.Future[int]:
    """Unload on a thread of its own, which keeps no test that fails from ending."""
    freed: Future[int] = Future()

    def run() -> None:
        try:
            freed.set_result(worker.loads.unload())
        except InferenceError as error:
            freed.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return asyncio.wrap_future(freed)


async def events_of(stream: AsyncIterator[InferenceEvent]) -> list[InferenceEvent]:
    return [event async for event in stream]


def broken() -> int:
    raise RuntimeError


def wait_on_the_loop_until(condition: Callable[[], bool]) -> None:
    """Keep the event loop from hearing anything meanwhile."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def end_of(events: list[InferenceEvent]) -> End:
    assert isinstance(events[-1], End)
    return events[-1]


def test_a_load_is_followed_and_then_served(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        assert worker.state == "no_model"
        with pytest.raises(Unavailable):
            worker.loads.progress()
        with pytest.raises(ModelNotLoaded):
            worker.submit(request())
        events = await load(worker, tiny)
        assert isinstance(events[-1], Ready)
        assert (worker.state, worker.engine.model.context_length) == ("ready", 512)
        assert worker.vram_bytes > 0
        job = worker.submit(request("mine"))
        assert job.id == "mine"
        assert end_of(await events_of(job.events())).tokens_out == 10

    with_worker(body)


def test_jobs_run_side_by_side_and_say_what_they_say_alone(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        jobs = [worker.submit(request(seed=seed % 3, max_tokens=30)) for seed in range(12)]
        streams = await asyncio.gather(*(events_of(job.events()) for job in jobs))
        texts = ["".join(event.t for event in stream if isinstance(event, Token)) for stream in streams]
        assert len(set(texts)) == 3
        assert texts == texts[:3] * 4

    with_worker(body, max_batch_size=5)


def test_cancelling_ends_the_stream_with_its_terminal_event(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        job = worker.submit(request("long", max_tokens=500))
        waiting = worker.submit(request("waiting"))
        await anext(job)
        worker.cancel("long")
        worker.cancel("waiting")
        worker.cancel("unknown")
        assert end_of(await events_of(job.events())).stop_reason == "cancelled"
        assert end_of(await events_of(waiting.events())).stop_reason == "cancelled"
        assert worker.jobs.running == worker.jobs.queued == 0

    with_worker(body, max_batch_size=1)


def test_a_consumer_that_leaves_cancels_its_job(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        job: Job = worker.submit(request(max_tokens=500))
        never_read = worker.submit(request(max_tokens=500))
        await anext(job)
        await job.aclose()
        await never_read.aclose()
        while worker.jobs.running:
            await asyncio.sleep(0.01)
        assert end_of(await events_of(worker.submit(request()).events())).tokens_out == 10

    with_worker(body)


def test_running_and_waiting_are_what_the_engine_says(tiny: str) -> None:
    """Places are free in the batch, and yet the second job waits: the KV cache has no room for both prompts."""

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        jobs = [worker.submit(replace(request(f"job-{i}", max_tokens=60), prompt=str(i) * 120)) for i in range(2)]
        first = jobs[0].events()
        while not isinstance(await anext(first), Token):
            pass
        assert (worker.jobs.running, worker.jobs.queued) == (1, 1)
        for job in jobs:
            await job.aclose()

    with_worker(body, kv_cache_memory=BYTES_OF_224_TOKENS, max_context=224)


def test_a_job_that_runs_again_after_its_preemption_counts_as_running_at_once(tiny: str) -> None:
    """Its second start emits nothing, and its next token may take long."""

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        emit, told = worker.engine._emit, []
        worker.engine._emit = lambda events, running: (told.append((len(events), running)), emit(events, running))[1]
        jobs = [worker.submit(replace(request(max_tokens=100), prompt=str(i) * 100)) for i in range(2)]
        await asyncio.gather(*(events_of(job.events()) for job in jobs))
        assert worker.engine.stats.preemptions
        assert (0, 1) in told

    with_worker(body, kv_cache_memory=BYTES_OF_224_TOKENS, max_context=224)


def test_an_engine_that_does_not_stop_in_time_frees_its_model_itself_and_keeps_nobody_waiting(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed_by = []

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        engine, stuck, going_on = worker.engine._engine, threading.Event(), threading.Event()
        free = engine.unload
        monkeypatch.setattr(engine, "unload", lambda: (freed_by.append(threading.current_thread().name), free())[1])
        worker.engine._commands.put(lambda: (stuck.set(), going_on.wait(60)))  # stands in for a step that takes long
        try:
            assert await asyncio.to_thread(stuck.wait, 60)
            unloading = unload(worker)
            while not worker.changing:
                await asyncio.sleep(0.001)
            worker.engine.stop(0.01)
            with pytest.raises(InferenceError, match="has died"):
                await unloading
            assert not freed_by  # not beside a step, on this thread
        finally:
            going_on.set()

    with_worker(body)
    assert freed_by == ["engine"]


def test_waiting_for_a_swap_ends_with_the_engine(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        job = worker.submit(request(max_tokens=400))
        unloading = unload(worker)
        while not worker.changing:
            await asyncio.sleep(0.001)
        settled = asyncio.create_task(worker.settled())

        worker.engine._commands.put(broken)
        with pytest.raises(InferenceError, match="has died"):
            await unloading
        with pytest.raises(InferenceError, match="has died"):  # no Conflict: the one before is over
            worker.loads.unload()
        await settled
        assert isinstance((await events_of(job.events()))[-1], InferenceFailed)

    with_worker(body)


def test_a_full_queue_and_a_doubled_id_are_refused(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        jobs = [worker.submit(request(f"job-{i}", max_tokens=300)) for i in range(3)]
        with pytest.raises(QueueFull) as refused:
            worker.submit(request())
        assert refused.value.retry_after
        for job in jobs:
            job.cancel()
            await events_of(job.events())
        first = worker.submit(request("twin", max_tokens=300))
        with pytest.raises(Conflict, match="twin"):
            worker.submit(request("twin"))
        await first.aclose()
        with pytest.raises(InvalidRequest):
            worker.submit(GenerationRequest(prompt=""))

    with_worker(body, max_queue=2, max_batch_size=1)


def test_a_failed_load_is_told_and_the_resident_model_goes_on(tiny: str, tmp_path: Path) -> None:
    async def body(worker: Worker) -> None:
        events = await load(worker, str(tmp_path / "nothing-here"))
        assert isinstance(events[-1], LoadFailed)
        assert (worker.state, events[-1].code) == ("failed", "MODEL_NOT_FOUND")
        assert worker.loads.error is not None
        assert worker.loads.error.exit_code == 3
        await load(worker, tiny)
        assert worker.state == "ready"
        events = await load(worker, str(tmp_path / "nothing-here"))
        assert isinstance(events[-1], LoadFailed)
        assert worker.state == "ready"
        assert end_of(await events_of(worker.submit(request()).events())).tokens_out == 10

    with_worker(body)


def test_the_last_loads_are_kept_newest_first_and_no_more(tiny: str, tmp_path: Path) -> None:
    async def body(worker: Worker) -> None:
        assert list(worker.loads.history) == []
        events = await load(worker, tiny)
        # Who has seen the end finds it in the history.
        [kept] = worker.loads.history
        assert (kept.model, kept.end) == (tiny, events[-1])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", kept.started_at)
        for number in range(KEPT_LOADS):
            await load(worker, str(tmp_path / f"missing-{number}"))
        await unload(worker)
        kept_now = list(worker.loads.history)
        assert [Path(past.model).name for past in kept_now] == [f"missing-{n}" for n in reversed(range(KEPT_LOADS))]
        assert {past.end.stage for past in kept_now} == {"error"}

    with_worker(body)


def test_a_cancelled_load_ends_with_cancelled_and_only_one_runs_at_a_time(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=40)

    async def body(worker: Worker) -> None:
        assert not worker.loads.cancel()
        assert worker.loads.begin(str(path)) is False
        with pytest.raises(Conflict):
            worker.loads.begin(str(path))
        with pytest.raises(Unavailable):
            worker.submit(request())
        stream = worker.loads.progress()
        await anext(stream)
        assert worker.loads.cancel()
        events = [event async for event in stream]
        assert isinstance(events[-1], LoadCancelled)
        assert worker.vram_bytes == 0

    with_worker(body)


def test_a_new_model_takes_over_when_the_jobs_of_the_old_have_ended(tiny: str, tmp_path: Path) -> None:
    other = str(write_tiny_model(tmp_path / "other", max_position_embeddings=128))

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        job = worker.submit(request(max_tokens=200))
        assert worker.loads.begin(other) is True
        loading = asyncio.create_task(load_to_end(worker))
        assert end_of(await events_of(job.events())).tokens_out == 200
        assert isinstance((await loading)[-1], Ready)
        assert (worker.engine.model.name, worker.engine.model.context_length) == ("other", 128)

    with_worker(body)


def test_a_model_that_does_not_fit_beside_the_old_one_waits_for_its_jobs_and_unloads_it(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(write_tiny_model(tmp_path / "other"))

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        monkeypatch.setattr(
            "rbee_worker.worker.loads.has_room", lambda _plan, _config, _resident, *, instead=False: instead
        )
        unload, unloads = worker.engine._engine.unload, []

        def spy() -> int:
            unloads.append(worker.engine._engine.has_work)
            return unload()

        monkeypatch.setattr(worker.engine._engine, "unload", spy)
        job = worker.submit(request(max_tokens=200))
        assert worker.loads.begin(other) is False
        loading = asyncio.create_task(load_to_end(worker))
        assert end_of(await events_of(job.events())).tokens_out == 200
        events = await loading
        assert unloads == [False]
        assert events[0].stage == "resolving"
        assert isinstance(events[-1], Ready)
        assert worker.engine.model.name == "other"

    with_worker(body)


def test_a_model_that_fits_nowhere_does_not_cost_the_resident_one(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(write_tiny_model(tmp_path / "other"))

    def no_room(*_: object, **__: object) -> None:
        raise OutOfMemory("It does not fit.")

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        monkeypatch.setattr(load_module, "check_room", no_room)
        assert worker.loads.begin(other) is True
        assert isinstance((await load_to_end(worker))[-1], LoadFailed)
        assert worker.state == "ready"
        assert isinstance((await events_of(worker.submit(request()).events()))[-1], End)

    with_worker(body)


def test_a_job_that_comes_when_the_engine_has_died_ends(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)

        def dies_meanwhile(*arguments: Any) -> Sequence:
            worker.engine._commands.put(broken)
            worker.engine._thread.join()
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(60)  # the loop has heard of it
            return prepare(*arguments)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr("rbee_worker.worker.worker.prepare", dies_meanwhile)
        job = await asyncio.to_thread(worker.submit, request())
        assert isinstance((await events_of(job.events()))[-1], InferenceFailed)

    with_worker(body)


def test_a_load_beside_a_resident_model_reads_its_headers_once(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    make_plan = plan_module.make_plan

    def spy(source: ModelSource, config: EngineConfig) -> LoadPlan:
        planned.append(source.name)
        return make_plan(source, config)

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        for module in (plan_module, load_module):
            monkeypatch.setattr(module, "make_plan", spy)
        assert isinstance((await load(worker, tiny))[-1], Ready)
        assert len(planned) == 1

    with_worker(body)


def test_a_job_prepared_on_one_model_never_runs_on_another(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        late = threading.Event()
        worker.engine._commands.put(lambda: late.wait(10))
        job = worker.submit(request())
        worker.engine._engine.model = replace(worker.engine.model, name="swapped")  # as a swap in between would
        late.set()
        (event,) = await events_of(job.events())
        assert isinstance(event, InferenceFailed)
        assert event.code == "UNAVAILABLE"

    with_worker(body)


def test_a_swap_that_waits_for_jobs_is_no_readiness_and_can_be_cancelled(tiny: str, tmp_path: Path) -> None:
    other = str(write_tiny_model(tmp_path / "other"))

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        job = worker.submit(request(max_tokens=500))
        assert worker.loads.begin(other) is True
        loading = asyncio.create_task(load_to_end(worker))
        while not worker.changing:
            await asyncio.sleep(0.001)
        assert not worker.serves
        with pytest.raises(Unavailable):
            worker.submit(request())
        with pytest.raises(Conflict):
            worker.loads.begin(other)
        with pytest.raises(Conflict):
            worker.loads.unload()
        assert worker.loads.cancel()
        assert isinstance((await loading)[-1], LoadCancelled)
        assert worker.serves
        assert worker.engine.model.name == Path(tiny).name
        job.cancel()
        await events_of(job.events())

    with_worker(body)


def test_a_load_during_an_unload_is_refused_and_spoils_nothing(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        job = worker.submit(request(max_tokens=400))
        unloading = unload(worker)
        while not worker.changing:
            await asyncio.sleep(0.001)
        with pytest.raises(Conflict):
            worker.loads.begin(tiny)
        job.cancel()
        assert await unloading > 0
        events = await load(worker, tiny)
        assert isinstance(events[-1], Ready)
        assert worker.serves

    with_worker(body)


def test_a_cancel_waits_for_one_step_however_many_commands_wait(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        job = worker.submit(request("mine", max_tokens=500))
        others = [worker.submit(request(f"job-{i}", max_tokens=500)) for i in range(40)]
        await anext(job)
        steps = 0
        step = worker.engine._engine.step

        def counted() -> object:
            nonlocal steps
            steps += 1
            return step()

        worker.engine._engine.step = counted  # type: ignore[method-assign]
        for other in others:
            other.cancel()
        worker.cancel("mine")
        before = steps
        assert end_of(await events_of(job.events())).stop_reason == "cancelled"
        assert steps - before <= 3

    with_worker(body)


def test_a_failed_load_keeps_nothing_alive(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[weakref.ref[object]] = []

    def broken(transformer: object) -> None:
        built.append(weakref.ref(transformer))
        raise MemoryError

    monkeypatch.setattr("rbee_worker.runtime.loading.load._warm_up", broken)

    async def body(worker: Worker) -> None:
        events = await load(worker, tiny)
        assert isinstance(events[-1], LoadFailed)
        assert events[-1].code == "OUT_OF_MEMORY"
        del events
        gc.collect()
        assert [reference() for reference in built] == [None]

    with_worker(body)


async def load_to_end(worker: Worker) -> list[LoadingEvent]:
    return [event async for event in worker.loads.progress()]


def test_unloading_waits_for_jobs_and_frees_the_model(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        size = worker.vram_bytes
        job = worker.submit(request(max_tokens=100))
        freed, events = await asyncio.gather(unload(worker), events_of(job.events()))
        assert end_of(events).tokens_out == 100
        assert freed == size
        assert (worker.state, worker.vram_bytes) == ("no_model", 0)
        with pytest.raises(ModelNotLoaded):
            worker.tokenizer()
        with pytest.raises(Unavailable):
            worker.loads.progress()

    with_worker(body)


def test_draining_lets_jobs_finish_within_the_grace(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        job = worker.submit(request())
        await worker.drain(60)
        assert worker.state == "draining"
        with pytest.raises(Unavailable):
            worker.submit(request())
        with pytest.raises(Unavailable):
            worker.loads.begin(tiny)
        assert end_of(await events_of(job.events())).stop_reason == "max_tokens"

    with_worker(body)


def test_draining_ends_the_jobs_that_the_grace_was_too_short_for(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        cancelled, cancel = threading.Event(), worker.engine.cancel
        monkeypatch.setattr(worker.engine, "cancel", lambda job_id: (cancel(job_id), cancelled.set()))
        worker.engine._commands.put(lambda: cancelled.wait(60))  # so that the job cannot have ended before
        job = worker.submit(request(max_tokens=400))
        await worker.drain(0.01)
        assert end_of(await events_of(job.events())).stop_reason == "cancelled"

    with_worker(body)


def test_closing_ends_the_streams_of_what_still_runs(tiny: str) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        jobs = [worker.submit(request(max_tokens=500)) for _ in range(2)]
        await anext(jobs[0])
        await worker.close()
        for job in jobs:
            assert isinstance((await events_of(job.events()))[-1], InferenceFailed)

    with_worker(body, max_batch_size=1)


def test_an_engine_that_dies_fails_its_jobs_and_says_so(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)

        def die() -> None:
            raise SystemError("broken")

        job = worker.submit(request(max_tokens=500))
        await anext(job)
        monkeypatch.setattr(worker.engine._engine, "step", die)
        events = await events_of(job.events())
        assert isinstance(events[-1], InferenceFailed)
        while worker.engine.alive:
            await asyncio.sleep(0.01)
        assert worker.state == "failed"
        with pytest.raises(ModelNotLoaded, match="the engine has died; restart the worker"):
            worker.submit(request())

    with_worker(body)


def test_the_model_is_built_on_one_thread_and_run_on_another(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rbee_worker.runtime.model.decoder import Transformer

    threads: set[str] = set()
    forward = Transformer.forward

    def spy(self: Transformer, batch: object) -> object:
        threads.add(threading.current_thread().name)
        return forward(self, batch)  # type: ignore[arg-type]

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        assert threads == {"loader"}
        threads.clear()
        monkeypatch.setattr(Transformer, "forward", spy)
        await asyncio.gather(*(events_of(worker.submit(request()).events()) for _ in range(4)))
        assert threads == {"engine"}
        assert isinstance(worker.engine.model, LoadedModel)

    monkeypatch.setattr(Transformer, "forward", spy)
    with_worker(body)


def test_a_cancelled_swap_frees_its_model_at_once(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = str(write_tiny_model(tmp_path / "other"))
    built: list[weakref.ref[object]] = []
    install = EngineThread.install

    def noted(self: EngineThread, model: LoadedModel, cancel: Cancellation) -> None:
        built.append(weakref.ref(model.transformer))
        install(self, model, cancel)

    monkeypatch.setattr(EngineThread, "install", noted)

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        step_ends = threading.Event()
        worker.engine._commands.put(lambda: step_ends.wait(60))
        assert worker.loads.begin(other) is True
        loading = asyncio.create_task(load_to_end(worker))
        try:
            while not worker.changing:
                await asyncio.sleep(0.001)
            worker.loads.cancel()
            assert isinstance((await loading)[-1], LoadCancelled)
            gc.collect()
            assert built[1]() is None
        finally:
            step_ends.set()

    with_worker(body)


def test_a_load_has_the_claim_before_it_reads_headers(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slow(*arguments: object) -> object:
        reading.set()
        assert go_on.wait(10)
        return plan_local(*arguments)

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        before = worker.loads.broadcast
        before.latest_counts = replace(before.latest_counts, vram_mb=7)  # as a larger model's would be
        monkeypatch.setattr("rbee_worker.worker.loads.plan_local", slow)
        begun = asyncio.create_task(asyncio.to_thread(worker.loads.begin, tiny))
        try:
            await asyncio.to_thread(reading.wait, 10)
            with pytest.raises(Conflict, match="A load is running"):
                worker.loads.begin(tiny)
            with pytest.raises(Conflict, match="A load is running"):
                worker.loads.unload()
            assert worker.serves
            assert worker.vram_bytes == worker.engine.model.nbytes  # no figure of the load before is added
            assert worker.loads.cancel()
        finally:
            go_on.set()
        assert await begun is True
        assert isinstance((await load_to_end(worker))[-1], LoadCancelled)

    with_worker(body)


def test_a_load_that_gets_no_thread_leaves_all_as_it_was(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "loader":
            raise RuntimeError
        start(thread)

    async def body(worker: Worker) -> None:
        await load(worker, str(tmp_path / "nothing-here"))
        before = worker.state, worker.loads.error, worker.loads.broadcast
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError):
                worker.loads.begin(tiny)
        assert (worker.state, worker.loads.error, worker.loads.broadcast) == before
        assert isinstance((await load(worker, tiny))[-1], Ready)

    with_worker(body)


def test_a_load_that_cannot_be_planned_leaves_the_way_free(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        with monkeypatch.context() as patch:
            patch.setattr("rbee_worker.worker.loads.plan_local", no_memory)
            with pytest.raises(MemoryError):
                worker.loads.begin(tiny)
        assert isinstance((await load(worker, tiny))[-1], Ready)

    with_worker(body)


def test_no_load_begins_once_the_worker_drains(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)

        def drained(*arguments: object) -> object:
            asyncio.run_coroutine_threadsafe(worker.drain(0), loop).result(10)
            return plan_local(*arguments)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr("rbee_worker.worker.loads.plan_local", drained)
        await asyncio.to_thread(worker.loads.begin, tiny)
        assert isinstance((await load_to_end(worker))[-1], LoadCancelled)

    with_worker(body)


def test_running_and_waiting_are_told_with_the_events(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that has ended in the engine runs, not waits, until the loop hears of its end."""

    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        submitted, go_on, step = threading.Event(), threading.Event(), worker.engine._engine.step

        def slow() -> object:
            assert go_on.wait(60)
            return step()

        monkeypatch.setattr(worker.engine._engine, "step", slow)
        worker.engine._commands.put(lambda: submitted.wait(60))
        try:
            short, long = worker.submit(request(max_tokens=5)), worker.submit(request(max_tokens=400))
            assert (worker.jobs.running, worker.jobs.queued) == (0, 2)  # the engine has not seen them
            submitted.set()
            await anext(short)
            await anext(long)
            go_on.set()
            wait_on_the_loop_until(lambda: worker.engine._engine.running < 2)
            assert (worker.jobs.running, worker.jobs.queued) == (2, 0)
        finally:
            submitted.set()
            go_on.set()
        await events_of(short.events())
        assert (worker.jobs.running, worker.jobs.queued) == (len(worker.jobs), 0)
        await long.aclose()

    with_worker(body)


def test_a_model_that_cannot_be_freed_keeps_nobody_waiting(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        going_on = threading.Event()
        monkeypatch.setattr(worker.engine._engine, "unload", broken)
        worker.engine._commands.put(lambda: going_on.wait(60))
        try:
            job = worker.submit(request(max_tokens=400))
            unloading = unload(worker)
            while not worker.changing:
                await asyncio.sleep(0.001)
            worker.engine._stopping.set()  # as a stop does, which waits for longer
        finally:
            going_on.set()
        with pytest.raises(InferenceError, match="has died"):
            await unloading
        assert isinstance((await events_of(job.events()))[-1], InferenceFailed)

    with_worker(body)


def test_an_unload_does_not_overtake_a_job(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        stepping, go_on, step = threading.Event(), threading.Event(), worker.engine._engine.step

        def slow() -> object:
            stepping.set()
            assert go_on.wait(60)
            return step()

        monkeypatch.setattr(worker.engine._engine, "step", slow)
        worker.engine.cancel("nobody")  # wakes the thread
        await asyncio.to_thread(stepping.wait, 60)
        job = worker.submit(request())
        unloading = unload(worker)
        while not worker.changing:
            await asyncio.sleep(0.001)
        go_on.set()
        assert end_of(await events_of(job.events())).tokens_out == 10
        assert await unloading > 0

    with_worker(body)
