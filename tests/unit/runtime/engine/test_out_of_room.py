"""Where room runs out: guesses at the end of the context, and prompts that lose their place half-way."""

import pytest

from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.events import End, InferenceEvent, PromptLogprobs
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.engine.prompt_lookup import PromptLookup
from tests.engines import loaded, run
from tests.tiny import write_tiny_model

CONTEXT = 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def engine_of(path: str, **config: int) -> Engine:
    return loaded(path, max_context=CONTEXT, **config)


@pytest.mark.parametrize("max_tokens", [None, 30])
def test_no_guess_goes_beyond_the_end(tiny: str, max_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny, speculate=7)
    # One token over and over, and all guesses right.
    monkeypatch.setattr(PromptLookup, "draft", lambda *_: (65,) * 7)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logit_bias=((65, 100.0),))
    ends = [list(engine.generate(GenerationRequest(prompt="abc" * 3, sampling=params)))[-1] for _ in range(2)]
    for end in ends:
        assert isinstance(end, End)
        assert end.stop_reason == ("context_full" if max_tokens is None else "max_tokens")
        assert end.tokens_out == (CONTEXT - 9 if max_tokens is None else 30)
    assert engine.stats.steps < sum(end.tokens_out for end in ends if isinstance(end, End))


def test_a_prompt_that_begins_again_tells_its_log_probabilities_once_and_whole(tiny: str) -> None:
    engine = engine_of(tiny, prefill_chunk=8)
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    asked = GenerationRequest(prompt="a prompt of some length", sampling=params)

    def told(events: list[InferenceEvent]) -> list[tuple[int, float | None]]:
        (found,) = (event for event in events if isinstance(event, PromptLogprobs))
        return [(entry.id, entry.logprob) for entry in found.logprobs]

    expected = told(list(engine.generate(asked)))
    sequence = engine.submit(asked)
    engine.step()
    assert 0 < sequence.computed < sequence.prompt_tokens
    engine._scheduler._preempt(sequence)
    (events,) = run(engine).values()
    found = told(events)
    assert [token for token, _ in found] == [token for token, _ in expected]
    assert [logprob for _, logprob in found[1:]] == pytest.approx([logprob for _, logprob in expected[1:]], abs=1e-4)
