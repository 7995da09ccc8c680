"""Logits that are not finite end their job with an ``error`` event, on every path, and no other job of the batch."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rbee_worker.config import GenerationRequest, GrammarSpec, SamplingParams
from rbee_worker.events import End, InferenceEvent, InferenceFailed, PromptLogprobs, Started, Token
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.model.decoder import Batch
from tests import engines
from tests.engines import run, text
from tests.tiny import byte_tokenizer, write_tiny_model

NAN, INF = float("nan"), float("inf")
TOKENS = byte_tokenizer().get_vocab()
POISON = "Z"
"""A character whose embedding is spoilt after the load, and with it whatever prompt holds it."""

PATHS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 1},
    "nucleus": {"temperature": 0.7, "top_p": 0.5, "top_k": 9, "min_p": 0.01, "seed": 1},
    "penalties": {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 1.0, "logit_bias": ((7, 50.0),)},
    "logprobs": {"temperature": 0, "logprobs": 5},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 2},
    "grammar": {"temperature": 0, "grammar": GrammarSpec("regex", "[ab]{4,40}")},
    "sampled grammar": {"temperature": 1.0, "seed": 1, "grammar": GrammarSpec("regex", "[ab]{4,40}")},
}
SPECULATION = (0, 3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


Loaded = Callable[..., Engine]


@pytest.fixture
def loaded(tiny: Path) -> Loaded:
    return functools.partial(engines.loaded, tiny)


def request(prompt: str, job_id: str, **sampling: object) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": 20, "ignore_eos": True} | sampling)
    return GenerationRequest(prompt=prompt, job_id=job_id, sampling=params)


def poison(engine: Engine) -> None:
    """Spoil the embedding of one character."""
    assert engine.model is not None
    table = engine.model.transformer._embedding.table
    weights = table if isinstance(table, Tensor) else table.matrix.data  # as it is stored
    weights[TOKENS[POISON]] = NAN if weights.is_floating_point() else 255  # of bytes of blocks: a scale that is none


def spoil_logit(engine: Engine, token: int, value: float) -> None:
    """From now on the logit of a token is this, whatever the model sees."""
    assert engine.model is not None
    transformer = engine.model.transformer
    head = transformer._head

    def spoilt(x: torch.Tensor) -> torch.Tensor:
        logits = head(x)
        logits[:, token] = value
        return logits

    transformer._head = spoilt  # type: ignore[assignment]


def assert_failed(events: list[InferenceEvent]) -> None:
    assert isinstance(events[0], Started)
    assert [type(event) for event in events if event.terminal] == [InferenceFailed]
    last = events[-1]
    assert isinstance(last, InferenceFailed)
    assert last.code == "INFERENCE_FAILED"
    assert "logits are not finite numbers" in last.message


def with_neighbors(tiny: Path, path: str, speculate: int) -> Engine:
    """Three jobs whose prompts are fine, one of which goes the path."""
    engine = engines.loaded(tiny, speculate=speculate, prefill_chunk=16)
    poison(engine)
    engine.submit(request("abab" * 4, "one", temperature=0))
    engine.submit(request("xyz", "two", **PATHS["nucleus"]))
    engine.submit(request("a b", "three", **PATHS[path]))
    return engine


@functools.cache
def said_alone(tiny: Path, path: str, speculate: int) -> dict[str, str]:
    """What they say with nobody beside them."""
    return {job_id: text(events) for job_id, events in run(with_neighbors(tiny, path, speculate)).items()}


@pytest.mark.parametrize("speculate", SPECULATION)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prompt", [f"a{POISON}", f"a{POISON}b" * 2, f"{POISON} " + "long " * 30])
def test_the_first_token_behind_a_spoilt_prompt_is_an_error_and_the_neighbours_go_on(
    tiny: Path, path: str, speculate: int, prompt: str
) -> None:
    alone = said_alone(tiny, path, speculate)
    engine = with_neighbors(tiny, path, speculate)
    engine.submit(request(prompt, "spoilt", **PATHS[path]))
    streams = run(engine)
    assert_failed(streams["spoilt"])
    assert not [event for event in streams["spoilt"] if isinstance(event, Token | PromptLogprobs)]
    for job_id, words in alone.items():
        assert isinstance(streams[job_id][-1], End)
        assert text(streams[job_id]) == words != ""
    # Its blocks of the cache, which hold what it computed, spoil nobody who gets them next.
    assert isinstance(run_one(engine, request("again", "next", temperature=0))[-1], End)


def run_one(engine: Engine, job: GenerationRequest) -> list[InferenceEvent]:
    engine.submit(job)
    return run(engine)[job.job_id or ""]


@pytest.mark.parametrize("speculate", SPECULATION)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_one_logit_in_the_middle_of_an_answer(loaded: Loaded, path: str, speculate: int, bad: float) -> None:
    engine = loaded(speculate=speculate)
    engine.submit(request("abab" * 4, "job", **PATHS[path]))

    def spoil(step: int) -> None:
        if step == 2:
            # One that no grammar above allows: a mask must not hide it.
            spoil_logit(engine, TOKENS["Q"], bad)

    events = run(engine, spoil)["job"]
    assert_failed(events)
    assert text(events)


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_a_cap_on_logits_hides_none(loaded: Loaded, bad: float) -> None:
    engine = loaded()
    assert engine.model is not None
    transformer = engine.model.transformer
    transformer.config = dataclasses.replace(transformer.config, final_softcap=30.0)
    assert isinstance(run_one(engine, request("fine", "job", temperature=0))[-1], End)
    spoil_logit(engine, TOKENS["Q"], bad)
    assert_failed(run_one(engine, request("spoilt", "job", temperature=0)))


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_in_every_form_of_weights_the_neighbours_go_on(loaded: Loaded, dtype: str, quantize: str) -> None:
    engines = [loaded(dtype=dtype, quantize=quantize) for _ in range(2)]
    for engine in engines:
        poison(engine)
        engine.submit(request("neighbour", "healthy", temperature=0))
    engines[1].submit(request(f"some {POISON}", "spoilt", temperature=0))
    alone, streams = (run(engine) for engine in engines)
    assert_failed(streams["spoilt"])
    assert isinstance(streams["healthy"][-1], End)
    assert text(streams["healthy"]) != ""
    if dtype == "float32":  # 16-bit sums may be rounded otherwise in another batch
        assert text(streams["healthy"]) == text(alone["healthy"])


def test_what_stands_behind_a_wrong_guess_concerns_nobody(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, guessing = loaded(), loaded(speculate=3)
    expected = text(run_one(plain, request("abc", "job", temperature=0)))
    guess, spoilt = TOKENS["Q"], []
    monkeypatch.setattr(Sequence, "draft", lambda sequence: (guess, guess) if sequence.tokens_left > 3 else ())
    assert guessing.model is not None
    forward = guessing.model.transformer.forward

    def spoil(batch: Batch) -> torch.Tensor:
        logits = forward(batch).clone()
        if len(logits) == 3 and int(logits[0].argmax()) != guess:
            spoilt.append(logits)
            logits[1:] = NAN
        return logits

    monkeypatch.setattr(guessing.model.transformer, "forward", spoil)
    events = run_one(guessing, request("abc", "job", temperature=0))
    assert spoilt
    assert isinstance(events[-1], End)
    assert text(events) == expected
