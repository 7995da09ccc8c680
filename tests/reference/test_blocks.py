"""Weights quantized, as they are loaded, to the blocks that the worker's own kernels multiply by."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from torch import Tensor

from rbee_worker.config import EngineConfig
from rbee_worker.errors import ModelMalformed, ModelUnsupported, OutOfMemory
from rbee_worker.events import LoadReport
from rbee_worker.kernels import quantize as quantizer
from rbee_worker.kernels.formats import FORMATS
from rbee_worker.kernels.library import cpu_kernels, missing_reason
from rbee_worker.kernels.quantize import quantize
from rbee_worker.kernels.widths import quantized_type
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.inspection import inspect_model
from rbee_worker.runtime.loading import parts
from rbee_worker.runtime.loading.fit import needs, weights_bytes
from rbee_worker.runtime.loading.plan import check_room, plan_local
from rbee_worker.runtime.machine.devices import DeviceInfo
from rbee_worker.runtime.source import resolve
from tests.engines import loaded
from tests.tiny import write_tiny_model

from .families import CASES, Case
from .test_families import fill, prompts_of, save
from .test_gguf_families import write
from .test_logits import logits_of, relative_error, transformer_of
from .test_stored import stored

pytestmark = [
    pytest.mark.cpu_forms,
    pytest.mark.skipif(cpu_kernels() is None, reason=f"the kernels do not run here: {missing_reason()}"),
]

CASE = Case("Qwen2", {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "head_dim": 64})
CONFIG = EngineConfig(device="cpu", max_context=64, max_batch_size=1, prefill_chunk=16)
BITS = {"int8": 8, "int4": 4}


def report_of(path: Path, **config: Any) -> tuple[Engine, LoadReport]:
    engine = Engine(EngineConfig(device="cpu", **config))
    *_, ready = engine.load(str(path))
    return engine, ready.report


def logits(engine: Engine, case: Case = CASE) -> Tensor:
    return torch.cat(logits_of(transformer_of(engine), prompts_of(case)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(CASE, tmp_path_factory.mktemp("blocks") / "model")


@pytest.mark.parametrize("asked", BITS)
def test_a_quantized_model_is_the_file_of_the_same_blocks_bit_for_bit(asked: str, folder: Path, tmp_path: Path) -> None:
    """The file is decoded and compared with float64 arithmetic elsewhere; see ``test_stored``."""

    def store(name: str, tensor: Tensor) -> tuple[np.ndarray[Any, Any], Type | None]:
        if tensor.dim() == 1:
            return tensor.numpy(), None
        table = name in ("token_embd.weight", "output.weight") or "embed" in name or "lm_head" in name
        kind = quantized_type(BITS[asked], tensor.shape[1], table=table)
        assert kind is not None
        blocks = torch.empty(tensor.shape[0], FORMATS[kind].row_bytes(tensor.shape[1]), dtype=torch.uint8)
        quantize(tensor.float().contiguous(), FORMATS[kind], blocks)
        return blocks.numpy(), Type[kind]

    file = write(tmp_path / "model.gguf", "qwen2", fill(CASE).eval(), store)
    engine, report = report_of(folder, quantize=asked)
    same, _ = report_of(file)
    assert torch.equal(logits(engine), logits(same))
    assert transformer_of(engine).nbytes == transformer_of(same).nbytes
    assert (report.quantize, report.kernel) == (asked, cpu_kernels().variant)
    assert report.runs_as == {"int8": "Q8_0", "int4": "Q4_K, Q8_0"}[asked]


def divergence(engine: Engine, exact: Tensor) -> float:
    ours = logits(engine).double().log_softmax(-1)
    return float((exact.exp() * (exact - ours)).sum(-1).mean())


def test_searched_scales_diverge_less_than_those_of_the_largest_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(replace(CASE, changes={**CASE.changes, "num_hidden_layers": 2}), tmp_path / "calm")
    tensors = load_file(path / "model.safetensors")  # with smaller weights a small error stays one
    calm = {key: tensor * 0.25 if tensor.dim() > 1 else tensor for key, tensor in tensors.items()}
    save_file(calm, path / "model.safetensors", metadata={"format": "pt"})
    exact = logits(loaded(path)).double().log_softmax(-1)
    eight, four = (divergence(report_of(path, quantize=asked)[0], exact) for asked in BITS)
    assert eight < four / 20

    def symmetric(w: Any, *_: object) -> Any:
        largest = np.abs(w).max(0)
        return largest / 7.5, -largest

    monkeypatch.setattr(quantizer, "_search", symmetric)
    monkeypatch.setattr(quantizer, "_plain", symmetric)
    assert four < 0.85 * divergence(report_of(path, quantize="int4")[0], exact)


@pytest.mark.parametrize(
    ("types", "asked", "runs_as"),
    [
        ((Type.Q4_0,), "int8", "Q4_0 (Q4_0 as stored: int8 was asked for, and they are no wider)"),
        ((Type.Q4_K, Type.Q4_K, Type.Q6_K), "int4", "as stored: int4 was asked for, and they are no wider)"),
        ((Type.Q8_0,), "int4", "Q8_0 quantized again: int4 was asked for; Q8_0 as stored: int4 was asked for"),
        ((Type.Q5_0,), "int8", "Q8_0 (Q5_0 quantized again: int8 was asked for)"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_blocks_of_a_file(types: tuple[Type, ...], asked: str, runs_as: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "model.gguf", *types)
    engine, report = report_of(path, quantize=asked)
    assert runs_as in report.runs_as
    held = transformer_of(engine)
    assert weights_bytes(held.config, held.form) == pytest.approx(held.nbytes, rel=0.02)
    exact = logits(loaded(path, "float32"))
    assert relative_error(logits(engine), exact) < (0.12 if asked == "int8" else 0.5)


def test_rows_that_no_block_fills_stay_in_16_bits_and_that_is_said(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "odd", hidden_size=80, intermediate_size=96, num_attention_heads=4)
    engine, report = report_of(path, quantize="int4")
    assert report.runs_as == "float16, Q4_1 (rows of 80 weights are no whole blocks)"
    held = transformer_of(engine)
    assert weights_bytes(held.config, held.form) == pytest.approx(held.nbytes, rel=0.02)


def test_a_tied_head_is_shared(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tied", hidden_size=64, tie_word_embeddings=True)
    held = transformer_of(report_of(path, quantize="int4")[0])
    assert weights_bytes(held.config, held.form) == pytest.approx(held.nbytes, rel=0.02)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_experts_are_quantized_too(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = save(case, tmp_path / "experts")
    engine, report = report_of(path, quantize="int4", dtype="float16")
    whole, _ = report_of(path, dtype="float16")
    assert report.runs_as.startswith("Q4_1")
    experts = [layer.mlp.nbytes for layer in transformer_of(engine).layers]
    assert sum(experts) < 0.6 * sum(layer.mlp.nbytes for layer in transformer_of(whole).layers)
    assert relative_error(logits(engine, case), logits(whole, case)) < 1


@pytest.mark.parametrize(("value", "error"), [(torch.nan, ModelMalformed), (-torch.inf, ModelMalformed), (7e4, None)])
def test_what_blocks_cannot_hold_names_the_tensor(value: float, error: Any, tmp_path: Path) -> None:
    path, name = write_tiny_model(tmp_path / "model"), "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path / "model.safetensors")
    tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    tensors[name][-1, -1] = value
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(error or ModelUnsupported, match=f"tensor '{name}' holds") as raised:
        report_of(path, quantize="int4")
    if error is None:
        assert "hold 65504 at most" in raised.value.message
        assert raised.value.advice() == "Use quantize=none dtype=bfloat16."


@pytest.mark.parametrize("matrix", ["gate_up_proj", "down_proj"])
def test_so_does_what_they_cannot_hold_of_experts_in_one_tensor(matrix: str, tmp_path: Path) -> None:
    path, name = save(CASES["GptOss"], tmp_path / "model"), f"model.layers.1.mlp.experts.{matrix}"
    tensors = load_file(path / "model.safetensors")
    tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    tensors[name][-1, -1, -1] = -7e4
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelUnsupported, match=f"tensor '{name}' holds -7") as raised:
        report_of(path, quantize="int4")
    assert "hold 65504 at most" in raised.value.message


def test_so_does_what_they_cannot_hold_of_experts_in_mxfp4(tmp_path: Path) -> None:
    path, wrong = save(CASES["GptOss"], tmp_path / "model"), "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.full((experts, outputs, inputs // 32, 16), 2, dtype=torch.uint8)  # ones
        tensors[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 127, dtype=torch.uint8)
    tensors[f"{wrong}_scales"][-1, 0, 0] = 127 + 17
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ModelUnsupported, match=f"tensor '{wrong}_scales' holds 131072") as raised:
        report_of(path, quantize="int4")
    assert "hold 65504 at most" in raised.value.message


def test_pieces_of_a_matrix_are_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = logits(report_of(folder, quantize="int4")[0])
    monkeypatch.setattr(parts, "QUANTIZED_WEIGHTS", 4096)
    assert torch.equal(logits(report_of(folder, quantize="int4")[0]), whole)


def refused(path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> list[Any]:
    """The settings that are proposed where a share of what the model needs is free."""
    plan = plan_local(str(path), CONFIG)
    assert plan is not None
    needed = needs(plan.config, plan.form, plan.context_length, CONFIG)
    free = needed.total - round((1 - share) * needed.weights)
    small = DeviceInfo("cpu", "CPU", 2 * free, free, free)
    monkeypatch.setattr("rbee_worker.runtime.loading.plan.device_info", lambda _: small)
    monkeypatch.setattr("rbee_worker.runtime.loading.plan.list_devices", lambda: [small])
    with pytest.raises(OutOfMemory) as raised:
        check_room(plan, CONFIG)
    return [dict(remedy.settings) for remedy in raised.value.remedies]


def test_a_model_that_does_not_fit_is_told_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    monkeypatch.setattr("rbee_worker.runtime.loading.fit.QUANTIZED_WEIGHTS", 1)  # more than this model has
    path = write_tiny_model(tmp_path / "wide", **wide)
    assert refused(path, monkeypatch, 0.9)[:2] == [{"quantize": "int8"}, {"quantize": "int4"}]
    assert {"quantize": "int4"} in refused(path, monkeypatch, 0.45)
    assert {"quantize": "int8"} not in refused(path, monkeypatch, 0.45)


def test_inspect_says_what_a_load_then_holds(folder: Path) -> None:
    needed = {need.dtype: need.weights_bytes for need in inspect_model(resolve(str(folder)), 64).memory}
    for asked in BITS:
        held = transformer_of(report_of(folder, quantize=asked)[0]).nbytes
        assert needed[asked] == pytest.approx(held, rel=0.02)
