"""``bench decode`` on a real engine with a tiny model: every figure that fits, and none that does not."""

import json
from pathlib import Path

import pytest

from rbee_worker.cli.bench import decode, machine
from rbee_worker.errors import InferenceError
from rbee_worker.runtime.model.decoder import Transformer
from rbee_worker.runtime.model.linear.cpu import describe_kernels
from tests.engines import loaded
from tests.tiny import write_tiny_model
from tests.unit.cli.harness import run

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--tokens", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny", max_position_embeddings=2100))


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)


def test_every_figure_is_taken_in_every_round(model: str, tmp_path: Path) -> None:
    done = run("bench", "decode", "-m", model, *OPTIONS, "--runs", "2", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert list(told["figures"]) == list(decode.FIGURES)
    assert told["left_out"] == {}
    assert told["machine"]["cpu_kernels"] == describe_kernels()
    for key, figure in told["figures"].items():
        assert len(figure["values"]) == 2, key
        assert 0 < figure["min"] <= figure["median"] <= figure["max"], key
    # 128 tokens a second of prefill, and milliseconds until the first token, are one measurement.
    rates, waits = (told["figures"][key]["values"] for key in ("prefill_128_tok_s", "first_token_128_ms"))
    assert [rate * wait for rate, wait in zip(rates, waits, strict=True)] == pytest.approx([128_000] * 2, rel=1e-3)
    before = tmp_path / "before.json"
    before.write_text(done.stdout)
    again = run("bench", "decode", "-m", model, *OPTIONS, "--runs", "1", "--compare", str(before))
    assert again.exit_code == 0, again.stderr
    assert "tiny: float32, dense, F32; 1 round\n" in "\n".join(map(str.strip, again.stdout.splitlines())) + "\n"
    for figure in decode.FIGURES.values():
        assert figure.label in again.stdout
    assert "now / before" in again.stdout
    assert "torch thread" in again.stdout
    assert f"CPU kernels: {describe_kernels()}\n" in again.stdout
    assert "ready: tiny" in again.stderr


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "short", max_position_embeddings=130)
    done = run("bench", "decode", "-m", str(model), *OPTIONS, "--runs", "1")
    assert done.exit_code == 0, done.stderr
    assert "left out: prefill of 512 tokens: the context holds 130 tokens" in done.stdout
    # 128 tokens fit, and not three more after them.
    assert "│ prefill of 128 tokens" in done.stdout
    assert "left out: decode at a context of 128: the context holds 130 tokens" in done.stdout
    assert "left out: weights read while decoding at 128" in done.stdout


def test_a_context_too_short_for_anything_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "short", max_position_embeddings=34)
    done = run("bench", "decode", "-m", str(model), *OPTIONS)
    assert (done.exit_code, done.stdout) == (4, "")
    assert "A context of 34 tokens has no room" in done.stderr


def test_batches_that_the_cache_does_not_hold_are_left_out() -> None:
    plan = decode.Plan.of(context=1000, room=1000, tokens=64)
    assert plan.batches == [1, 2, 4, 8]
    assert plan.left_out["together_16_tok_s"] == "the KV cache holds 1000 tokens"


def test_together_counts_the_tokens_of_all_while_all_run(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loaded(model, max_batch_size=4, prefix_cache=False)
    ticks = iter(range(1000))
    monkeypatch.setattr(decode.time, "perf_counter", lambda: float(next(ticks)))
    # The clock is read twice, a second apart.
    assert decode.Meter(engine, 256).together(4, tokens=5) == 20
    assert not engine.has_work
    assert engine.stats.batch_sizes[4] >= 5


def test_a_step_that_fails_ends_it(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loaded(model)

    def broken(*_: object) -> object:
        raise RuntimeError("out of order")

    monkeypatch.setattr(Transformer, "forward", broken)
    with pytest.raises(InferenceError, match="out of order"):
        decode.Meter(engine, 256).alone(8, 2)


@pytest.mark.parametrize(("tied", "rows"), [(False, 320), (True, 0)])
def test_the_bytes_of_a_token_are_without_an_embedding_that_is_no_head(
    tmp_path: Path, *, tied: bool, rows: int
) -> None:
    engine = loaded(write_tiny_model(tmp_path / "m", tie_word_embeddings=tied))
    assert engine.model is not None
    assert engine.model.nbytes - engine.model.bytes_per_token == rows * 64 * 4


def test_the_model_is_the_argument_or_the_option_and_not_both(model: str) -> None:
    brief = ("--max-context", "100", "--tokens", "1", "--runs", "1", "--json", "--device", "cpu")
    for given, env in (([model], {"RBEE_MODEL": "nowhere"}), ([], {"RBEE_MODEL": model}), (["-m", model], {})):
        done = run("bench", "decode", *given, *brief, env=env)
        assert json.loads(done.stdout)["model"]["name"] == "tiny"
    done = run("bench", "decode", model, "-m", model, *brief)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "MODEL and --model: the model is given twice." in done.stderr
