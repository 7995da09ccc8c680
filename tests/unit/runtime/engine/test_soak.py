"""Ten thousand short requests through one engine: nothing piles up."""

import itertools
import statistics
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.events import End
from tests.engines import loaded
from tests.tiny import write_tiny_model

REQUESTS, WARM = 10_000, 2_000
MIB = 2**20


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind(tmp_path: Path) -> None:
    engine = loaded(write_tiny_model(tmp_path / "tiny"), max_batch_size=16, kv_cache_memory=2 * MIB)
    assert engine.model is not None
    pool, process = engine.model.transformer.cache.pool, psutil.Process()
    ended: Counter[str] = Counter()
    seconds: list[float] = []
    resident = 0
    coming = itertools.count()
    while len(ended) < REQUESTS:
        while engine.waiting + engine.running < 32 and (number := next(coming)) < REQUESTS:
            prompt = "The same beginning for all of them. " * (number % 3) + str(number)
            sampling = SamplingParams(max_tokens=1 + number % 7, temperature=number % 2, top_p=0.9)
            request = GenerationRequest(prompt=prompt, job_id=str(number), sampling=sampling)
            engine.submit(request)
            if number % 10 == 0:
                engine.cancel(str(number))
        began = time.perf_counter()
        events = engine.step()
        seconds.append(time.perf_counter() - began)
        for job_id, event in events:
            if event.terminal:
                assert isinstance(event, End)
                ended[job_id] += 1
        if len(ended) >= WARM and not resident:
            resident = process.memory_info().rss
    assert set(ended.values()) == {1}
    assert not engine.has_work
    assert pool.use.used == 0
    assert process.memory_info().rss - resident < 16 * MIB
    tenth = len(seconds) // 10
    early, late = seconds[2 * tenth : 3 * tenth], seconds[-tenth:]
    assert statistics.median(late) < 1.5 * statistics.median(early)
