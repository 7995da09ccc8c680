"""A panic of a native library ends where any other error ends, and leaves nobody waiting."""

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rbee_worker.config import EngineConfig, GrammarSpec
from rbee_worker.errors import Conflict, InferenceError, ModelMalformed
from rbee_worker.events import End, InferenceFailed, LoadFailed, Ready
from rbee_worker.panics import Panic, panics_as_errors
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.grammar.compiler import GrammarMatcher, _Vocabulary
from rbee_worker.runtime.source import resolve
from rbee_worker.runtime.tokenizer.detokenizer import _WindowStream
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer
from rbee_worker.worker.worker import Worker
from tests.tiny import damage_normalizer, panic, write_tiny_model
from tests.unit.worker.test_worker import events_of, load, request, with_worker


class Odd(BaseException):
    """Neither an Exception nor a panic: what no library should raise."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def raising(error: type[BaseException]) -> object:
    def raise_it(*_: object, **__: object) -> None:
        raise error("odd")

    return raise_it


def test_a_panic_becomes_an_exception_of_one_line() -> None:
    with pytest.raises(Panic, match="index out of bounds") as caught, panics_as_errors():
        panic()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, ValueError])
def test_what_is_no_panic_passes(error: type[BaseException]) -> None:
    with pytest.raises(error), panics_as_errors():
        raise error


def test_a_panic_while_a_tokenizer_is_read_names_the_file(tmp_path: Path) -> None:
    damage_normalizer(write_tiny_model(tmp_path))
    with pytest.raises(ModelMalformed, match=r"tokenizer\.json: .*charsmap") as caught:
        _ = resolve(str(tmp_path)).tokenizer
    assert "\n" not in str(caught.value)


def test_a_panic_while_a_text_is_encoded_is_an_error_without_the_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_files(resolve(str(damage_normalizer(write_tiny_model(tmp_path), in_use=True))))
    with pytest.raises(InferenceError, match="cannot encode this text"):
        tokenizer.encode("secret")


def test_a_load_that_panics_is_told_and_raised(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    monkeypatch.setattr("rbee_worker.runtime.loading.load._warm_up", panic)
    loading = engine.load(tiny)
    events = [next(loading)]
    while not events[-1].terminal:
        events.append(next(loading))
    assert isinstance(events[-1], LoadFailed)
    assert events[-1].code == "INTERNAL_ERROR"
    assert "index out of bounds" in events[-1].message
    with pytest.raises(Panic):
        next(loading)


@pytest.mark.parametrize(
    "place", ["loading.load._warm_up", "loading.reader.PartBuilder.build", "engine.engine.Engine.install"]
)
@pytest.mark.parametrize("broken", [panic, raising(Odd), raising(SystemExit)], ids=["panic", "odd", "exit"])
def test_whatever_ends_a_load_it_has_an_end_and_another_can_begin(
    tiny: str, place: str, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(worker: Worker) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(f"rbee_worker.runtime.{place}", broken)
            events = await load(worker, tiny)
        assert isinstance(events[-1], LoadFailed)
        assert [event.terminal for event in events].count(True) == 1
        assert worker.state == "failed"
        assert worker.loads.outcomes["error"] == 1
        assert isinstance((await load(worker, tiny))[-1], Ready)

    with_worker(body)


def test_a_load_whose_thread_cannot_start_claims_nothing(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(worker: Worker) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", raising(RuntimeError))
            with pytest.raises(RuntimeError):
                worker.loads.begin(tiny)
        try:
            assert isinstance((await load(worker, tiny))[-1], Ready)
        except Conflict:
            pytest.fail("the place is still claimed")

    with_worker(body)


def test_a_panic_in_a_step_fails_its_jobs_and_the_engine_goes_on(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        model = worker.engine.model
        assert model is not None
        with monkeypatch.context() as patch:
            patch.setattr(type(model.transformer), "forward", panic)
            events = await events_of(worker.submit(request()).events())
        assert isinstance(events[-1], InferenceFailed)
        assert worker.engine.alive
        assert isinstance((await events_of(worker.submit(request()).events()))[-1], End)

    with_worker(body)


def test_a_panic_while_text_is_decoded_is_an_error_without_the_text() -> None:
    backend: Any = SimpleNamespace(decode=panic)  # a decoder of the library's that panics is not known
    stream = _WindowStream(backend, [1], skip_special_tokens=True)
    with pytest.raises(InferenceError, match="cannot decode"):
        stream.push(2)


def test_a_panic_while_a_grammar_is_followed_fails_its_job_alone(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        # The matcher stands in for one that panics: which grammars make llguidance panic depends on its version.
        matcher: Any = SimpleNamespace(compute_bitmask=panic, is_stopped=lambda: False, is_error=lambda: False)
        grammar = GrammarMatcher(matcher, _Vocabulary(None, 320, (), None))  # type: ignore[arg-type]
        monkeypatch.setattr("rbee_worker.runtime.grammar.compiler.GrammarCompiler.compile", lambda *_: grammar)
        jobs = worker.submit_all([request("with", grammar=GrammarSpec("regex", "a+")), request("without")])
        with_grammar, without = [(await events_of(job.events()))[-1] for job in jobs]
        assert isinstance(with_grammar, InferenceFailed)
        assert "llguidance cannot follow the grammar" in with_grammar.message
        assert isinstance(without, End)

    with_worker(body)


@pytest.mark.parametrize("error", [Odd, SystemExit])
def test_an_engine_that_dies_of_anything_fails_its_jobs(
    tiny: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(worker: Worker) -> None:
        await load(worker, tiny)
        job = worker.submit(request(max_tokens=500))
        await anext(job)
        monkeypatch.setattr(worker.engine._engine, "step", raising(error))
        assert isinstance((await events_of(job.events()))[-1], InferenceFailed)
        while worker.engine.alive:
            await asyncio.sleep(0.01)
        assert worker.state == "failed"

    with_worker(body)
