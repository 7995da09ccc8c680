"""One job's figures."""

from types import SimpleNamespace

import pytest

from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.events import End
from rbee_worker.runtime.cache.block_pool import BlockPool
from rbee_worker.runtime.cache.kv_cache import SequenceCache
from rbee_worker.runtime.engine import sequence as module
from rbee_worker.runtime.engine.sampler import Sampled
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer
from tests.tiny import byte_tokenizer

EOS = 7


class Clock:
    """A fake: time stands still, but for what each token takes."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("tokens", "prefill_ms", "decode_ms", "rate"),
    [
        ([98, 99, 100], 1000, 2000, 1.0),
        ([98, 99, EOS], 1000, 1000, 1.0),
        ([98, EOS], 1000, 0, 0.0),
        ([EOS], 1000, 0, 0.0),
    ],
)
def test_the_rate_counts_the_tokens_of_the_answer_and_their_time_alone(
    monkeypatch: pytest.MonkeyPatch, tokens: list[int], prefill_ms: int, decode_ms: int, rate: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    request = GenerationRequest(prompt="any", sampling=SamplingParams(max_tokens=3))
    tokenizer = Tokenizer(byte_tokenizer(), eos_ids=frozenset({EOS}))
    job = Sequence("job", [1, 2], request, 0, tokenizer, context_length=10)
    list(job.admit("model", SequenceCache(BlockPool(1))))
    events = []
    for token in tokens:
        clock.now += 1
        events = list(job.append(Sampled(token)))
    end = events[-1]
    assert isinstance(end, End)
    assert end.tokens_out == sum(token != EOS for token in tokens)
    assert (end.prefill_time_ms, end.decode_time_ms, end.tokens_per_second) == (prefill_ms, decode_ms, rate)
