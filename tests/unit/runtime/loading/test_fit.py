"""The figures of the fit check, and that each remedy it proposes would work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rbee_worker.config import EngineConfig
from rbee_worker.errors import OutOfMemory, Remedy
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.architecture.table import parse_config
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.loading.fit import (
    Needs,
    Way,
    cache_positions,
    check_fit,
    check_host,
    limit_context,
    needs,
    weights_bytes,
)
from rbee_worker.runtime.loading.groups import WeightGroup
from rbee_worker.runtime.machine.devices import MIB, DeviceInfo
from rbee_worker.runtime.model.linear.linear import LinearFormat, choose_format
from tests.tiny import CONFIG, write_tiny_model

CPU = torch.device("cpu")
ENGINE = EngineConfig()
BIG = CONFIG | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
}


def parse(**values: object) -> ModelConfig:
    return parse_config(BIG | values, file="config.json")


def device(free: int, name: str = "cuda:0") -> DeviceInfo:
    return DeviceInfo(name, "a device", free + MIB, MIB, free)


def refusal(free: int, *ways: Way, dtype: str = "float16", context: int = 8192) -> OutOfMemory:
    form = choose_format(CPU, dtype)
    with pytest.raises(OutOfMemory) as raised:
        check(parse(), form, context, free, *ways)
    return raised.value


def check(config: ModelConfig, form: LinearFormat, context: int, free: int, *ways: Way) -> Needs:
    where = device(free)
    return check_fit("big", config, form, context=context, engine=ENGINE, device=where, alternatives=lambda: ways)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_what_a_load_then_holds(tmp_path: Path, dtype: str, tied: bool, quantize: str) -> None:
    path = write_tiny_model(tmp_path, tie_word_embeddings=tied)
    engine = Engine(EngineConfig(device="cpu", dtype=dtype, quantize=quantize))
    for _ in engine.load(str(path)):
        pass
    assert engine.model is not None
    held = engine.model.transformer
    assert weights_bytes(held.config, held.form) == pytest.approx(held.nbytes, rel=0.02)


def test_every_part_counts() -> None:
    form, config = choose_format(CPU, "float32"), parse()
    small = needs(config, form, 4096, ENGINE)
    assert needs(config, form, 8192, ENGINE).cache == 2 * small.cache == 2 * 4096 * config.kv_bytes_per_token(4)
    assert needs(config, form, 4096, replace(ENGINE, prefill_chunk=1024)).workspace > small.workspace
    assert needs(config, form, 4096, replace(ENGINE, max_batch_size=64)).workspace > small.workspace
    assert small.total == small.weights + small.cache + small.workspace
    with pytest.raises(OutOfMemory):
        check(config, form, 4096, small.total - 1)
    assert check(config, form, 4096, small.total) == small


def test_the_message_has_the_figures() -> None:
    needed = needs(parse(), choose_format(CPU, "float16"), 8192, ENGINE)
    error = refusal(100 * MIB)
    assert f"big needs {needed.total / MIB:,.0f} MiB on cuda:0" in error.message
    assert f"weights {needed.weights / MIB:,.0f} MiB, cache {needed.cache / MIB:,.0f} MiB" in error.message
    assert "100 MiB of 101 MiB are free" in error.message
    assert "at a context of 8,192 tokens" in error.message
    assert "No option makes it fit" in (error.hint or "")


def test_the_cache_takes_the_width_that_was_asked_for() -> None:
    config, form = parse(), choose_format(CPU, "float32")
    narrow = replace(ENGINE, kv_cache_dtype="float16")
    assert needs(config, form, 4096, ENGINE).cache == 2 * needs(config, form, 4096, narrow).cache
    memory = replace(narrow, kv_cache_memory=8 * MIB)
    sizes = [
        cache_positions(config, form, context=4096, engine=engine, free=0, device="cpu")
        for engine in (replace(memory, kv_cache_dtype="auto"), memory)
    ]
    assert sizes[1] == 2 * sizes[0]


def test_a_shorter_context_is_proposed_and_is_the_longest_that_fits() -> None:
    form, config = choose_format(CPU, "float16"), parse()
    free = needs(config, form, 20_000, ENGINE).total
    error = refusal(free, context=131_072)
    [remedy] = error.remedies
    context = remedy.settings["max_context"]
    assert isinstance(context, int)
    assert remedy == Remedy({"max_context": context}, round(needs(config, form, context, ENGINE).total / MIB))
    assert needs(config, form, context, ENGINE).total <= free < needs(config, form, context + 256, ENGINE).total
    check(config, form, context, free)


def test_other_ways_are_proposed_where_they_fit() -> None:
    int8, half = choose_format(CPU, "float16", "int8"), choose_format(CPU, "float16")
    roomy, tight = device(2**40, "cuda:1"), device(10 * MIB, "cpu")
    free = needs(parse(), int8, 8192, ENGINE).total
    elsewhere = ({"device": "cuda:1"}, half, roomy), ({"device": "cpu"}, half, tight)
    error = refusal(free, ({"quantize": "int8"}, int8, device(free)), *elsewhere)
    assert [remedy.settings for remedy in error.remedies if "max_context" not in remedy.settings] == [
        {"quantize": "int8"},
        {"device": "cuda:1"},
    ]
    assert "cpu" not in [remedy.settings.get("device") for remedy in error.remedies]
    assert str(error).endswith(f"; device=cuda:1 ({needs(parse(), half, 8192, ENGINE).total / MIB:,.0f} MiB).")


def test_a_cache_that_is_too_small_names_sizes_that_work() -> None:
    form, config = choose_format(CPU, "float16"), parse()
    engine = replace(ENGINE, kv_cache_memory=8 * MIB, max_context=4096)
    with pytest.raises(OutOfMemory, match=r"holds [0-9,]+ tokens of this model, fewer than the 4,096") as raised:
        limit_context(config, form, context=4096, engine=engine)
    memory, context = (remedy.settings for remedy in raised.value.remedies)
    size = int(str(memory["kv_cache_memory"]).removesuffix("MiB")) * MIB
    assert limit_context(config, form, context=4096, engine=replace(engine, kv_cache_memory=size)) == 4096
    shorter = int(context["max_context"])
    assert limit_context(config, form, context=shorter, engine=replace(engine, max_context=shorter)) == shorter


def test_a_cache_that_takes_too_much_names_the_largest_that_fits() -> None:
    form, config = choose_format(CPU, "float16"), parse()
    free = needs(config, form, 8192, ENGINE).total + 100 * MIB + 1
    engine = replace(ENGINE, kv_cache_memory=2**40)

    def check_with(kv_cache_memory: int) -> None:
        where, wanted = device(free), replace(engine, kv_cache_memory=kv_cache_memory)
        check_fit("big", config, form, context=8192, engine=wanted, device=where, alternatives=lambda: ())

    with pytest.raises(OutOfMemory) as raised:
        check_with(2**40)
    [remedy] = raised.value.remedies
    size = int(str(remedy.settings["kv_cache_memory"]).removesuffix("MiB")) * MIB
    check_with(size)
    with pytest.raises(OutOfMemory):
        check_with(size + MIB)


def test_the_real_refusal_names_ways_that_exist_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_model(tmp_path, max_position_embeddings=100_000)
    small = DeviceInfo("cpu", "CPU", 300 * MIB, 70 * MIB, 230 * MIB)
    monkeypatch.setattr("rbee_worker.runtime.loading.load.device_info", lambda _: small)
    monkeypatch.setattr("rbee_worker.runtime.loading.plan.device_info", lambda _: small)
    monkeypatch.setattr("rbee_worker.runtime.loading.plan.list_devices", lambda: [small])
    monkeypatch.setattr("rbee_worker.runtime.loading.plan.host_info", lambda: small)
    config = EngineConfig(device="cpu", dtype="float32", max_batch_size=1, max_context=100_000, prefill_chunk=64)
    with pytest.raises(OutOfMemory) as raised:
        list(Engine(replace(config, max_batch_size=200_000)).load(str(path)))
    assert raised.value.exit_code == 5
    limited = EngineConfig(device="cpu", dtype="float32", max_context=4096)
    assert list(Engine(limited).load(str(path)))[-1].stage == "ready"


def test_what_passes_through_the_host_must_fit_there() -> None:
    class Info:
        nbytes = 60 * MIB

    groups = [WeightGroup("layer", {"q.weight": Info()}) for _ in range(9)]  # type: ignore[dict-item]
    check_host("big", groups, device(120 * MIB, "cpu"))
    with pytest.raises(OutOfMemory, match="passes through 120 MiB of host memory"):
        check_host("big", groups, device(119 * MIB, "cpu"))
