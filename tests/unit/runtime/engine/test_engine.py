"""The engine on a random tiny model: laws that hold whatever the model says."""

import threading
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig, GenerationRequest, GrammarSpec, SamplingParams
from rbee_worker.conformance.order import faults_in
from rbee_worker.errors import Conflict, ContextTooLong, InvalidRequest, ModelMalformed, ModelNotLoaded
from rbee_worker.events import (
    End,
    InferenceEvent,
    InferenceFailed,
    LoadCancelled,
    LoadFailed,
    LoadingEvent,
    LoadingToVram,
    Started,
    Token,
    to_dict,
)
from rbee_worker.runtime.cache.kv_cache import Rotation
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.model.decoder import Batch
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer
from tests.engines import loaded, run, text
from tests.tiny import byte_tokenizer, write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny: Path) -> Engine:
    return loaded(tiny)


def request(prompt: str = "hello", job_id: str | None = None, **sampling: object) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, job_id=job_id, sampling=SamplingParams(**{"max_tokens": 12} | sampling))


def assert_whole_stream(events: list[InferenceEvent]) -> End:
    started, *tokens, end = events
    assert isinstance(started, Started)
    assert isinstance(end, End)
    assert [token.i for token in tokens if isinstance(token, Token)] == list(range(len(tokens)))
    return end


def test_loading_events_keep_the_order_contract(tiny: Path) -> None:
    events = list(Engine(EngineConfig(device="cpu", dtype="float32")).load(str(tiny)))
    assert faults_in(map(to_dict, events)) == []
    assert events[0].seq == 0
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == ["resolving", "loading_to_vram", "warming_up", "ready"]
    counts = [event for event in events if isinstance(event, LoadingToVram)]
    layers = [event.layers_loaded for event in counts]
    assert set(layers) == {0, 1, 2, 3}
    assert counts[-1].bytes_loaded == counts[-1].bytes_total
    assert [event.terminal for event in events] == [False] * (len(events) - 1) + [True]


def test_a_stream_is_numbered_and_ends_once(engine: Engine) -> None:
    events = list(engine.generate(request(ignore_eos=True)))
    end = assert_whole_stream(events)
    assert end.stop_reason == "max_tokens"
    assert end.tokens_out == 12
    assert end.prompt_tokens == 5
    assert not engine.has_work


def test_seed_decides_the_text_and_is_reported(engine: Engine) -> None:
    first = list(engine.generate(request(seed=1)))
    assert isinstance(first[0], Started)
    assert first[0].seed == 1
    assert text(first) == text(list(engine.generate(request(seed=1))))
    assert text(first) != text(list(engine.generate(request(seed=2))))
    drawn = list(engine.generate(request()))
    assert isinstance(drawn[0], Started)
    assert text(drawn) == text(list(engine.generate(request(seed=drawn[0].seed))))


def test_neighbours_and_chunks_do_not_change_what_a_sequence_says(tiny: Path) -> None:
    prompts = ["a", "some longer prompt " * 4, "mid " * 5, "xyz", "0123456789" * 3, "q", "last one"]
    jobs = [request(prompt, f"job-{i}", seed=i, temperature=0.9 * (i % 2)) for i, prompt in enumerate(prompts)]
    alone = [text(list(loaded(tiny).generate(job))) for job in jobs]
    together = loaded(tiny, prefill_chunk=7, max_batch_size=5)
    for job in jobs:
        together.submit(job)
    streams = run(together)
    assert [text(streams[f"job-{i}"]) for i in range(len(jobs))] == alone
    for events in streams.values():
        assert_whole_stream(events)


def test_the_text_is_what_decoding_all_tokens_at_once_gives(engine: Engine) -> None:
    assert engine.model is not None
    held = 0
    for seed in range(12):
        sequence = engine.submit(request(seed=seed, max_tokens=9, ignore_eos=True))
        (events,) = run(engine).values()
        assert text(events) == engine.model.tokenizer.decode(sequence.tokens[sequence.prompt_tokens :])
        held += text(events).endswith("\N{REPLACEMENT CHARACTER}")
    assert held, "no text ended inside a character: the test shows nothing about the last flush"


def test_the_rate_is_that_of_the_tokens_after_the_first(engine: Engine) -> None:
    end = assert_whole_stream(list(engine.generate(request(max_tokens=300, ignore_eos=True))))
    assert end.tokens_per_second * end.decode_time_ms / 1000 == pytest.approx(299, rel=0.02)


def test_a_prompt_with_a_token_the_model_lacks_harms_nobody(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, vocab_size=256)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save(str(path / "tokenizer.json"))
    engine = loaded(path)
    engine.submit(request(job_id="good"))
    with pytest.raises(InvalidRequest, match="token 256; the model knows 256"):
        engine.submit(request("hi <pad>"))
    assert_whole_stream(run(engine)["good"])


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    whole = text(list(engine.generate(request(temperature=0, max_tokens=40, ignore_eos=True))))
    stop = whole[6:9]
    events = list(engine.generate(request(temperature=0, max_tokens=40, ignore_eos=True, stop=(stop,))))
    end = assert_whole_stream(events)
    assert end.stop_reason == "stop_sequence"
    assert end.stop_sequence_matched == stop
    assert text(events) == whole[: whole.index(stop)]


def test_end_of_sequence_tokens_end_it_unless_ignored(tmp_path: Path, engine: Engine) -> None:
    probe = engine.submit(request(temperature=0))
    run(engine)
    eos = probe.tokens[probe.prompt_tokens + 3]
    where = probe.tokens[probe.prompt_tokens :].index(eos)
    stopping = loaded(write_tiny_model(tmp_path, eos_token_id=[eos, 319]))
    end = assert_whole_stream(list(stopping.generate(request(temperature=0))))
    assert (end.stop_reason, end.tokens_out) == ("eos", where)
    end = assert_whole_stream(list(stopping.generate(request(temperature=0, ignore_eos=True))))
    assert (end.stop_reason, end.tokens_out) == ("max_tokens", 12)


def test_behind_what_a_grammar_allows_comes_the_end_also_where_it_is_ignored(tmp_path: Path) -> None:
    stopping = loaded(write_tiny_model(tmp_path, eos_token_id=[7]))
    asked = request(grammar=GrammarSpec("regex", "a+"), ignore_eos=True, logit_bias=((7, 100.0),))
    events = list(stopping.generate(asked))
    assert (text(events), assert_whole_stream(events).tokens_out) == ("a", 1)


def test_a_full_context_ends_it(tiny: Path) -> None:
    engine = loaded(tiny, max_context=32)
    end = assert_whole_stream(list(engine.generate(request("x" * 20, max_tokens=None, ignore_eos=True))))
    assert (end.stop_reason, end.tokens_out) == ("context_full", 12)


def test_prompts_that_cannot_run_are_refused_at_the_call(tiny: Path) -> None:
    engine = loaded(tiny, max_context=32)
    with pytest.raises(ContextTooLong, match="32 tokens; the context holds 32"):
        engine.generate(request("x" * 32))
    with pytest.raises(InvalidRequest, match="empty"):
        engine.generate(request(""))
    with pytest.raises(InvalidRequest, match=r"^The prompt has no tokens\.$"):
        engine.generate(GenerationRequest(prompt_ids=()))
    with pytest.raises(InvalidRequest, match="either"):
        engine.generate(GenerationRequest())
    for ids, wrong in (((1, -2, 3), -2), ((1, 320), 320)):
        with pytest.raises(InvalidRequest, match=f"token {wrong}; the model knows 320"):
            engine.generate(GenerationRequest(prompt_ids=ids))
    with pytest.raises(InvalidRequest, match="chat template"):
        engine.generate(GenerationRequest(messages=({"role": "user", "content": "Hi"},)))
    with pytest.raises(ModelNotLoaded):
        Engine().generate(request())
    engine.submit(request(job_id="twin"))
    with pytest.raises(Conflict, match="twin"):
        engine.submit(request(job_id="twin"))


def test_a_load_that_finds_a_job_at_its_end_ends_with_an_error(engine: Engine, tiny: Path) -> None:
    loading = engine.load(str(tiny))
    events = [next(loading)]
    engine.submit(request(job_id="came in between"))
    with pytest.raises(Conflict, match="1 jobs still run"):
        events.extend(loading)
    assert [event.terminal for event in events] == [False] * (len(events) - 1) + [True]
    assert isinstance(events[-1], LoadFailed)
    assert events[-1].code == Conflict.code


def test_cancelling_frees_the_place_within_one_step(tiny: Path) -> None:
    engine = loaded(tiny, max_batch_size=1)
    engine.submit(request(job_id="runs", max_tokens=400, ignore_eos=True))
    engine.submit(request(job_id="waits"))
    engine.step()
    assert (engine.running, engine.waiting) == (1, 1)
    engine.cancel("runs")
    engine.cancel("waits")
    engine.cancel("unknown")
    events = engine.step()
    assert [(job, event.stop_reason) for job, event in events if isinstance(event, End)] == [
        ("runs", "cancelled"),
        ("waits", "cancelled"),
    ]
    assert not engine.has_work


def test_closing_the_iterator_cancels(engine: Engine) -> None:
    stream = engine.generate(request(max_tokens=400, ignore_eos=True))
    next(stream)
    assert engine.has_work
    stream.close()
    assert not engine.has_work


def test_everyone_moves_while_a_long_prompt_is_read(tiny: Path) -> None:
    engine = loaded(tiny, prefill_chunk=16)
    chat = engine.submit(request(job_id="chat", max_tokens=400, ignore_eos=True, temperature=0))
    for _ in range(2):
        engine.step()
    prompt = engine.submit(request("long " * 60, job_id="long"))
    steps = 0
    while len(prompt.tokens) == prompt.prompt_tokens:
        before = len(chat.tokens)
        engine.step()
        assert len(chat.tokens) == before + 1
        steps += 1
    assert steps == -(-300 // 16)


def test_a_failing_step_fails_its_jobs_and_the_engine_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.model is not None
    with monkeypatch.context() as patch:
        patch.setattr(engine.model.transformer.rotaries[0], "_cos", torch.zeros(0, 16))
        events = list(engine.generate(request()))
    assert isinstance(events[-1], InferenceFailed)
    assert events[-1].code == "INFERENCE_FAILED"
    assert_whole_stream(list(engine.generate(request())))


def test_one_that_cannot_be_admitted_fails_alone_and_leaves_no_block_taken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.model is not None
    transformer = engine.model.transformer
    rotation_for = transformer.rotation_for
    first, second, third = (engine.submit(request(prompt)) for prompt in ("hello", "a longer one", "again"))

    def failing(tokens: int) -> Rotation:  # a fake: nothing real fails here
        if tokens == second.prompt_tokens:
            raise MemoryError
        return rotation_for(tokens)

    monkeypatch.setattr(transformer, "rotation_for", failing)
    streams = run(engine)
    assert [type(event) for event in streams[second.job_id]] == [InferenceFailed]
    for sequence in (first, third):
        assert_whole_stream(streams[sequence.job_id])
    assert transformer.cache.pool.use.used == 0


def test_what_nobody_expected_is_logged(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert engine.model is not None
    with monkeypatch.context() as patch:
        patch.setattr(engine.model.transformer, "rotaries", None)
        list(engine.generate(request()))
    bad = engine.submit(request())
    monkeypatch.setattr(bad, "sampler", None)
    run(engine)
    assert [record.message for record in caplog.records] == ["a step failed", "sampling failed"]
    assert all(record.exc_info for record in caplog.records)


def test_one_whose_logits_are_no_numbers_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.model is not None
    forward = engine.model.transformer.forward

    def spoilt(batch: Batch) -> torch.Tensor:
        logits = forward(batch).clone()
        logits[0, 3] = float("nan")
        return logits

    monkeypatch.setattr(engine.model.transformer, "forward", spoilt)
    engine.submit(request(job_id="first"))
    engine.submit(request(job_id="second", max_tokens=1, ignore_eos=True))
    streams = run(engine)
    assert isinstance(streams["first"][-1], InferenceFailed)
    assert "not finite" in streams["first"][-1].message
    assert_whole_stream(streams["second"])


def test_the_log_probabilities_of_a_long_prompt_are_spelled_out_step_by_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spelled = []
    spell = Tokenizer.token_bytes
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda *args: spelled.append(args) or spell(*args))
    engine.submit(request("x" * 300, max_tokens=1, prompt_logprobs=0))
    most = 0
    while engine.has_work:
        before = len(spelled)
        engine.step()
        most = max(most, len(spelled) - before)
    # Its text and its bytes, of 64 tokens a step.
    assert len(spelled) >= 300
    assert most <= 2 * 65


@pytest.mark.parametrize("length", [40, 33, 32])
def test_every_prompt_token_is_counted_as_computed_or_as_reused(engine: Engine, length: int) -> None:
    for _ in range(2):
        list(engine.generate(request("p" * length)))
    stats = engine.stats
    assert stats.prefilled_tokens + stats.prefix_hit_tokens == stats.prefix_query_tokens == 2 * length


def test_a_cancelled_load_says_so_and_keeps_the_model_before(engine: Engine, tiny: Path) -> None:
    cancel = Cancellation()
    events = []
    for event in engine.load(str(tiny), cancel):
        events.append(event)
        if isinstance(event, LoadingToVram):
            cancel.set()
    assert isinstance(events[-1], LoadCancelled)
    assert_whole_stream(list(engine.generate(request())))


def test_a_load_cancelled_at_the_last_moment_is_cancelled(tiny: Path) -> None:
    cancel = Cancellation()
    engine = Engine(EngineConfig(device="cpu", dtype="float32"))
    for event in engine.load(str(tiny), cancel):
        if event.stage == "warming_up":
            cancel.set()
    assert isinstance(event, LoadCancelled)
    assert engine.model is None


def test_a_load_while_jobs_run_is_refused_at_once(engine: Engine, tiny: Path) -> None:
    engine.submit(request())
    with pytest.raises(Conflict):
        engine.load(str(tiny))


def test_streams_iterated_in_turn_keep_their_events(engine: Engine) -> None:
    first, second = engine.generate(request(seed=1)), engine.generate(request(seed=2))
    unstarted = engine.generate(request())
    mixed: list[list[InferenceEvent]] = [[], []]
    for one, other in zip(first, second, strict=False):
        mixed[0].append(one)
        mixed[1].append(other)
    mixed[0].extend(first)
    mixed[1].extend(second)
    for events, seed in zip(mixed, (1, 2), strict=True):
        assert text(events) == text(list(engine.generate(request(seed=seed))))
    del unstarted
    assert not engine.has_work


def test_one_failing_sampler_loses_nobody_else_an_event(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.submit(request(job_id="good", max_tokens=1))
    bad = engine.submit(request(job_id="bad"))
    monkeypatch.setattr(bad, "sampler", None)
    streams = run(engine)
    assert_whole_stream(streams["good"])
    assert isinstance(streams["bad"][-1], InferenceFailed)


def test_one_whose_text_fails_loses_nobody_else_an_event(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.submit(request(job_id="first", max_tokens=3, ignore_eos=True))
    bad = engine.submit(request(job_id="bad", ignore_eos=True))
    engine.submit(request(job_id="last", max_tokens=3, ignore_eos=True))
    monkeypatch.setattr(bad, "_detokenizer", None)
    streams = run(engine)
    for job in ("first", "last"):
        assert assert_whole_stream(streams[job]).tokens_out == 3
    failed = streams["bad"][-1]
    assert isinstance(failed, InferenceFailed)
    assert failed.code == "INFERENCE_FAILED"
    assert failed.message.startswith("Sampling failed: ")


def test_a_stop_string_in_the_last_piece_of_text_counts(engine: Engine) -> None:
    stop, half = "\N{REPLACEMENT CHARACTER}", byte_tokenizer().encode("é").ids[0]
    always_half = request(max_tokens=1, logit_bias=((half, 100.0),), temperature=0)
    assert text(list(engine.generate(always_half))) == stop  # what the end makes of half a character
    stopped = replace(always_half, sampling=replace(always_half.sampling, stop=(stop,)))
    events = list(engine.generate(stopped))
    end = assert_whole_stream(events)
    assert text(events) == ""
    assert (end.stop_reason, end.stop_sequence_matched) == ("stop_sequence", stop)


def test_unloading_ends_what_still_runs(engine: Engine) -> None:
    stream = engine.generate(request(max_tokens=400, ignore_eos=True))
    next(stream)
    engine.submit(request(job_id="other"))
    engine.unload()
    assert isinstance(list(stream)[-1], InferenceFailed)
    assert [(job, type(event)) for job, event in engine.step()] == [("other", InferenceFailed)]
    assert not engine.has_work


def test_closing_a_load_leaves_no_reader_behind(tiny: Path) -> None:
    loading = Engine(EngineConfig(device="cpu")).load(str(tiny))
    while not isinstance(next(loading), LoadingToVram):
        pass
    loading.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weight-reader")]


def test_a_failed_load_tells_and_raises(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, num_hidden_layers=2)
    config = (path / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (path / "config.json").write_text(config)
    events: list[LoadingEvent] = []
    with pytest.raises(ModelMalformed, match=r"model\.layers\.2\.input_layernorm\.weight' is missing") as raised:
        deque(map(events.append, Engine().load(str(path))), maxlen=0)
    assert isinstance(events[-1], LoadFailed)
    assert (events[-1].code, events[-1].message) == ("MODEL_MALFORMED", str(raised.value))


def test_unloading_gives_the_memory_back(engine: Engine) -> None:
    assert engine.model is not None
    size = engine.model.nbytes
    assert engine.unload() == size > 0
    assert engine.unload() == 0
    with pytest.raises(ModelNotLoaded):
        engine.generate(request())
