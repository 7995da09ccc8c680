"""Many at once, against one at a time: whatever comes, goes and runs short, each says what it would say alone."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.errors import OutOfMemory
from rbee_worker.events import End, InferenceEvent, InferenceFailed, PromptLogprobs, PromptProgress, Started, Token
from rbee_worker.runtime.cache.block_pool import BLOCK_TOKENS
from rbee_worker.runtime.engine import decide
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.engine.sampler import Sampled, Sampler, sample
from tests.engines import loaded, run, text
from tests.tiny import byte_tokenizer, write_tiny_model

BYTES_PER_TOKEN = 3 * 2 * 2 * 16 * 4
"""Of the tiny model in float32: layers, keys and values, heads, head_dim, bytes."""

CONTEXT = 96

BEGINNINGS = ("", "You are a helpful worker. " * 2, "You are a helpful worker. You never sleep.", "abcabcabcabcabcabc")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Some ids end it, so that sequences end by themselves as well.
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny"), eos_token_id=[7, 70, 270, 300]))


def engine_of(path: str, *, blocks: int | None = None, **config: Any) -> Engine:
    memory = None if blocks is None else blocks * BLOCK_TOKENS * BYTES_PER_TOKEN
    return loaded(path, kv_cache_memory=memory, **config)


@functools.cache
def model_of(path: str) -> Any:
    return engine_of(path, max_context=CONTEXT).model


def warm_engine(path: str, *, blocks: int, **config: Any) -> Engine:
    """An engine with a fresh cache over the one model, which need not be loaded again."""
    model = model_of(path)
    model.transformer.allocate_cache(blocks * BLOCK_TOKENS, prefix_cache=config.get("prefix_cache", True))
    engine = Engine(EngineConfig(device="cpu", dtype="float32", **config))
    engine.install(model)
    return engine


def said(events: list[InferenceEvent]) -> tuple[str, str, str | None]:
    """The text, why it ended, and the stop string."""
    (end,) = (event for event in events if isinstance(event, End))
    return text(events), end.stop_reason, end.stop_sequence_matched


@functools.cache
def alone(path: str, prompt: str, sampling: SamplingParams) -> tuple[str, str, str | None]:
    engine = warm_engine(path, blocks=16, prefix_cache=False)
    return said(list(engine.generate(GenerationRequest(prompt=prompt, sampling=sampling))))


def rounding_decides(path: str, prompt: str, sampling: SamplingParams) -> bool:
    """Whether one of its tokens is so close a call that the rounding of a pass, which others' rows change, decides."""
    close = []

    def noisy(logits: Tensor, samplers: list[Sampler], masks: Any) -> list[Sampled]:
        noise = torch.randn(16, logits.shape[1], generator=torch.Generator().manual_seed(0)) * 3e-5
        close.append(len({sampled.token for sampled in sample(logits + noise, samplers * 16)}) > 1)
        return sample(logits, samplers, masks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decide, "sample", noisy)
        alone.__wrapped__(path, prompt, sampling)
    return any(close)


samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("e",), ("xy", "q")]),
    logit_bias=st.sampled_from([(), ((101, 2.0), (7, -100.0))]),
)
prompts = st.builds(str.__add__, st.sampled_from(BEGINNINGS), st.text("abc ", min_size=1, max_size=30))
arrival = st.tuples(st.just("arrive"), prompts, samplings, st.sampled_from(["", "one", "two"]))
moves = st.lists(
    arrival | st.tuples(st.just("cancel"), st.integers(0, 20)) | st.tuples(st.just("steps"), st.integers(1, 12)),
    min_size=2,
    max_size=24,
)


def check_accounts(engine: Engine) -> None:
    """What the pool counts is what the sequences hold, and nobody writes where another reads."""
    assert engine.model is not None
    pool = engine.model.transformer.cache.pool
    users = [0] * pool.blocks
    for sequence in engine._scheduler.running:
        assert sequence.cache is not None
        for block in sequence.cache.blocks:
            users[block] += 1
        first_written = sequence.cache.length // BLOCK_TOKENS
        assert all(pool._users[block] == 1 for block in sequence.cache.blocks[first_written:])
    for sequence in engine._scheduler.waiting:
        assert sequence.cache is None
    assert [pool._users[block] for block in range(pool.blocks)] == users
    assert sum((pool.use.free, pool.use.used, pool.use.cached)) == pool.blocks
    assert len(engine._scheduler.running) <= engine.config.max_batch_size


engines = st.fixed_dictionaries(
    {
        "blocks": st.integers(CONTEXT // BLOCK_TOKENS, 20),
        "prefill_chunk": st.sampled_from([5, 16, 64]),
        "max_batch_size": st.integers(1, 5),
        "prefix_cache": st.booleans(),
        "speculate": st.sampled_from([0, 3]),
    }
)


def play(engine: Engine, moves: list[Any]) -> tuple[dict[str, Any], set[str], dict[str, list[InferenceEvent]]]:
    """Make the moves, check the accounts after each step, and run to the end: jobs, those cancelled, streams."""
    jobs: dict[str, Any] = {}
    cancelled: set[str] = set()
    streams: dict[str, list[InferenceEvent]] = {}

    def step() -> None:
        for job_id, event in engine.step():
            streams.setdefault(job_id, []).append(event)
        check_accounts(engine)

    for move in moves:
        match move:
            case ("arrive", prompt, params, client):
                job_id = f"job-{len(jobs)}"
                jobs[job_id] = (prompt, params)
                engine.submit(GenerationRequest(prompt=prompt, job_id=job_id, sampling=params, client=client))
            case ("cancel", number):
                cancelled.add(f"job-{number}")
                engine.cancel(f"job-{number}")
            case ("steps", count):
                for _ in range(count):
                    step()
    while engine.has_work:
        step()
    return jobs, cancelled, streams


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=moves, config=engines)
def test_each_says_what_it_says_alone(tiny: str, moves: list[Any], config: dict[str, Any]) -> None:
    note(f"{moves=} {config=}")
    expected = {move[1:3]: alone(tiny, *move[1:3]) for move in moves if move[0] == "arrive"}
    engine = warm_engine(tiny, **config)
    jobs, cancelled, streams = play(engine, moves)
    for job_id, job in jobs.items():
        events = streams[job_id]
        assert sum(event.terminal for event in events) == 1
        assert events[-1].terminal
        assert not any(isinstance(event, InferenceFailed) for event in events)
        words, reason, stop = said(events)
        if reason == "cancelled":
            assert job_id in cancelled
            assert expected[job][0].startswith(words.rstrip("\N{REPLACEMENT CHARACTER}")) or rounding_decides(
                tiny, *job
            )
        else:
            assert (words, reason, stop) == expected[job] or rounding_decides(tiny, *job)
    assert engine.model is not None
    assert engine.model.transformer.cache.pool.use.used == 0


def greedy(prompt: str, job_id: str | None = None, **params: Any) -> GenerationRequest:
    options = {"temperature": 0, "max_tokens": 30, "ignore_eos": True} | params
    return GenerationRequest(prompt=prompt, job_id=job_id, sampling=SamplingParams(**options))


def test_a_full_cache_preempts_what_came_last_and_nobody_notices(tiny: str) -> None:
    prompts = [letter * 40 for letter in "abcd"]
    expected = [alone(tiny, prompt, greedy(prompt).sampling) for prompt in prompts]
    engine = warm_engine(tiny, blocks=14, max_batch_size=4)
    for prompt in prompts:
        engine.submit(greedy(prompt, prompt[0]))
    streams = run(engine)
    assert [said(streams[prompt[0]]) for prompt in prompts] == expected
    assert engine.stats.preemptions > 0
    for events in streams.values():
        assert sum(isinstance(event, Started) for event in events) == 1


def test_what_can_never_fit_is_refused_at_load(tiny: str) -> None:
    with pytest.raises(OutOfMemory, match=r"holds 32 tokens of this model, fewer than the 64 of its context"):
        engine_of(tiny, blocks=2, max_context=64)
    engine = engine_of(tiny, blocks=2)
    assert engine.model is not None
    assert engine.model.context_length == 32
    end = list(engine.generate(greedy("x" * 20)))[-1]
    assert isinstance(end, End)
    assert (end.stop_reason, end.tokens_out) == ("context_full", 12)


def test_a_prompt_seen_before_is_not_computed_again(tiny: str) -> None:
    engine = warm_engine(tiny, blocks=20)
    prompt = "the same long beginning of everything " * 2
    first = list(engine.generate(greedy(prompt, max_tokens=4)))
    computed = engine.stats.prefilled_tokens
    again = list(engine.generate(greedy(prompt, max_tokens=4)))
    assert said(again) == said(first)
    first_end, again_end = first[-1], again[-1]
    assert isinstance(first_end, End)
    assert isinstance(again_end, End)
    assert first_end.cached_tokens == 0
    assert again_end.cached_tokens == (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert engine.stats.prefilled_tokens - computed == len(prompt) - again_end.cached_tokens
    stats = engine.stats
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (2 * len(prompt), again_end.cached_tokens)


def test_an_answer_is_reused_by_the_next_turn(tiny: str) -> None:
    engine = warm_engine(tiny, blocks=20)
    sequence = engine.submit(greedy("What is it, then, that you want of me?", max_tokens=20))
    run(engine)
    turn = GenerationRequest(prompt_ids=(*sequence.tokens, 65, 66), sampling=SamplingParams(max_tokens=2))
    end = list(engine.generate(turn))[-1]
    assert isinstance(end, End)
    assert end.cached_tokens == (len(sequence.tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_alike_prompts_that_come_together_are_computed_once(tiny: str) -> None:
    engine = warm_engine(tiny, blocks=40, max_batch_size=4)
    prompt = "n choices of one and the same prompt, which is long enough to be worth it: " + "go "
    for job in "abcd":
        sampling = SamplingParams(seed=ord(job), max_tokens=6)
        engine.submit(GenerationRequest(prompt=prompt, job_id=job, sampling=sampling))
    streams = run(engine)
    shared = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    cached = [event.cached_tokens for events in streams.values() for event in events if isinstance(event, End)]
    assert sorted(cached) == [0, shared, shared, shared]
    assert engine.stats.prefilled_tokens == len(prompt) + 3 * (len(prompt) - shared)


def test_no_prefix_cache_means_none(tiny: str) -> None:
    engine = warm_engine(tiny, blocks=20, prefix_cache=False)
    for _ in range(2):
        end = list(engine.generate(greedy("once more and once more and once more")))[-1]
        assert isinstance(end, End)
        assert end.cached_tokens == 0


def test_clients_take_turns(tiny: str) -> None:
    engine = warm_engine(tiny, blocks=20, max_batch_size=1)
    for number in range(4):
        engine.submit(
            GenerationRequest(prompt="a", job_id=f"busy-{number}", client="busy", sampling=SamplingParams(max_tokens=2))
        )
    engine.step()
    engine.submit(GenerationRequest(prompt="b", job_id="other", client="other", sampling=SamplingParams(max_tokens=2)))
    order = [job for job, events in run(engine).items() if isinstance(events[-1], End)]
    assert order.index("other") == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_save_steps_and_change_nothing(tiny: str, temperature: float) -> None:
    prompt = "abcabcabcabcabcabc"
    # A bias makes it repeat itself, as text that is worth guessing does.
    bias = ((97, 20.0), (98, 20.0), (99, 20.0)) if temperature else ()
    request = greedy(prompt, temperature=temperature, seed=5, logit_bias=bias, max_tokens=60)
    plain = warm_engine(tiny, blocks=12)
    expected = said(list(plain.generate(request)))
    guessing = warm_engine(tiny, blocks=12, speculate=4)
    assert said(list(guessing.generate(request))) == expected
    assert guessing.stats.generated_tokens == plain.stats.generated_tokens
    # Each step brings one token, and one more for each guess that was right.
    assert guessing.stats.accepted_tokens == plain.stats.steps - guessing.stats.steps > 0
    assert guessing.stats.drafted_tokens >= guessing.stats.accepted_tokens
    assert plain.stats.drafted_tokens == plain.stats.accepted_tokens == 0


def test_progress_is_told_where_it_is_asked_for(tiny: str) -> None:
    engine = warm_engine(tiny, blocks=20, prefill_chunk=20)
    list(engine.generate(greedy("x" * 33, max_tokens=1)))
    request = GenerationRequest(prompt="x" * 70, prompt_progress=True, sampling=SamplingParams(max_tokens=2))
    told = [event for event in engine.generate(request) if isinstance(event, PromptProgress)]
    assert [(event.total, event.cached, event.processed) for event in told] == [(70, 32, 52), (70, 32, 70)]


def test_log_probabilities_are_told_where_they_are_asked_for(tiny: str) -> None:
    engine = warm_engine(tiny, blocks=20, prefill_chunk=8)
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    sequence = engine.submit(GenerationRequest(prompt="hello there, worker", sampling=params))
    (events,) = run(engine).values()
    (of_prompt,) = (event for event in events if isinstance(event, PromptLogprobs))
    assert [entry.id for entry in of_prompt.logprobs] == sequence.tokens[: sequence.prompt_tokens]
    assert of_prompt.logprobs[0].logprob is None
    assert b"".join(bytes(entry.bytes) for entry in of_prompt.logprobs) == b"hello there, worker"
    told = [entry for event in events if isinstance(event, Token) for entry in event.logprobs or ()]
    assert [entry.id for entry in told] == sequence.tokens[sequence.prompt_tokens :][: len(told)]
    for entry in told:
        # Greedy: what was taken is the likeliest.
        assert entry.top[0].id == entry.id
        assert entry.top[0].logprob == entry.logprob
        assert entry.logprob is not None
        assert len(entry.top) == 3
        assert sum(math.exp(other.logprob) for other in entry.top if other.logprob is not None) <= 1
    # The prompt's are those that generating it would have given.
    entire = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    ids = tuple(sequence.tokens)
    (again,) = (
        event
        for event in engine.generate(GenerationRequest(prompt_ids=ids, sampling=entire))
        if isinstance(event, PromptLogprobs)
    )
    for entry, before in zip(again.logprobs[sequence.prompt_tokens :], told, strict=False):
        assert entry.logprob == pytest.approx(before.logprob, abs=1e-4)


def test_a_job_past_its_deadline_ends_with_an_error(tiny: str) -> None:
    engine = warm_engine(tiny, blocks=20, max_batch_size=1)
    engine.submit(greedy("someone else", "runs"))
    waits = GenerationRequest(prompt="late", job_id="late", timeout_seconds=1e-6)
    engine.submit(waits)
    (failure,) = run(engine)["late"]
    assert isinstance(failure, InferenceFailed)
    assert failure.code == "DEADLINE_EXCEEDED"


def test_a_storm_of_cancels_hurts_nobody(tiny: str) -> None:
    expected = alone(tiny, "steady", greedy("steady", max_tokens=60).sampling)
    engine = warm_engine(tiny, blocks=24, max_batch_size=4)
    steady = engine.submit(greedy("steady", "steady", max_tokens=60))
    streams: dict[str, list[InferenceEvent]] = {}
    for number in range(60):
        for job_id in (f"short-{number}", f"gone-{number}"):
            engine.submit(greedy("come and go " * 2, job_id))
        engine.cancel(f"gone-{number}")
        engine.cancel(f"short-{number - 1}")
        before = len(steady.tokens)
        for job_id, event in engine.step():
            streams.setdefault(job_id, []).append(event)
        check_accounts(engine)
        assert len(steady.tokens) == before + 1 or steady.finished
        # Within the step: their places and their blocks are free.
        assert {sequence.job_id for sequence in engine._scheduler.running} <= {"steady", f"short-{number}"}
        assert engine.waiting == 0
    streams["steady"] += run(engine).get("steady", [])
    assert said(streams["steady"]) == expected


def test_a_bias_decides(tiny: str) -> None:
    engine = warm_engine(tiny, blocks=20)
    sequence = engine.submit(greedy("any", logit_bias=((66, 100.0),), max_tokens=5))
    run(engine)
    assert sequence.tokens[sequence.prompt_tokens :] == [66] * 5


def engine_with_mark(folder: Path) -> Engine:
    """Its token 256 is special, and makes no text."""
    path = write_tiny_model(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<mark>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return engine_of(str(path))


def test_special_tokens_are_in_the_text_where_that_is_asked_for(tmp_path: Path) -> None:
    engine = engine_with_mark(tmp_path)
    only_mark = {"logit_bias": ((256, 100.0),), "max_tokens": 2}
    assert said(list(engine.generate(greedy("any", **only_mark))))[0] == ""
    assert said(list(engine.generate(greedy("any", skip_special_tokens=False, **only_mark))))[0] == "<mark>" * 2


def test_every_log_probability_is_told_also_of_tokens_that_make_no_text(tmp_path: Path) -> None:
    engine = engine_with_mark(tmp_path)
    events = list(engine.generate(greedy("any", logit_bias=((256, 100.0),), max_tokens=3, logprobs=0)))
    (token,) = (event for event in events if isinstance(event, Token))
    assert token.t == ""
    assert [entry.id for entry in token.logprobs or ()] == [256] * 3
