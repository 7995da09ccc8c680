"""Quantised checkpoints against their dequantised twins: the same weights, the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rbee_worker.config import EngineConfig
from rbee_worker.events import LoadingToVram, Ready
from rbee_worker.runtime.checkpoint import TensorInfo, read_safetensors
from rbee_worker.runtime.dequantize import read_dequantized
from rbee_worker.runtime.engine import Engine
from rbee_worker.runtime.inspection import inspect_model
from rbee_worker.runtime.quantization import present
from rbee_worker.runtime.quantized import QuantizedTensor
from rbee_worker.runtime.source import resolve

from .conftest import load
from .quantized import Quantise, awq, bitsandbytes, compressed, fp8, gptq, int8_rows, write
from .test_logits import logits_of, random_prompts, reference, relative_error, transformer_of


def gptq_config(bits: int, size: int, *, symmetric: bool, **options: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "damp_percent": 0.1} | options


def compressed_case(layout: str, **weights: Any) -> tuple[dict[str, Any], Quantise]:
    given = {"type": "int", "num_bits": 8, "symmetric": True, "dynamic": False, "observer": "minmax"} | weights
    said = {key: value for key, value in given.items() if key != "reorder"}
    if "reorder" in given:
        said["actorder"] = "group"
    group = {"targets": ["Linear"], "weights": said, "input_activations": None, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.5,
    }
    given.pop("observer")
    return config, compressed(format=layout, **given)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "llm_int8_threshold": 6.0}
NF4 = BNB | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}

CASES: dict[str, tuple[dict[str, Any], Quantise]] = {
    "fp8 blocks": (FP8 | {"weight_block_size": [32, 40]}, fp8((32, 40), name="weight_scale_inv")),
    "fp8 tensor": (FP8, fp8(None, name="weight_scale")),
    "fp8 e5m2": (FP8, fp8(None, torch.float8_e5m2, name="weight_scale")),
    "fbgemm fp8": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        lambda weight: fp8((1, weight.shape[1]), name="weight_scale")(weight),
    ),
    "gptq 4-bit": (
        gptq_config(4, 32, symmetric=True),
        gptq(bits=4, size=32, symmetric=True, version=1),
    ),
    "gptq 4-bit asymmetric": (
        gptq_config(4, 32, symmetric=False, checkpoint_format="gptq", desc_act=False),
        gptq(bits=4, size=32, symmetric=False, version=1),
    ),
    "gptq 4-bit v2, act-order": (
        gptq_config(4, 32, symmetric=False, checkpoint_format="gptq_v2", desc_act=True),
        gptq(bits=4, size=32, symmetric=False, version=2, order=True),
    ),
    "gptq 8-bit, act-order": (
        gptq_config(8, 16, symmetric=True, desc_act=True),
        gptq(bits=8, size=16, symmetric=True, version=1, order=True),
    ),
    "gptq 4-bit, one group": (
        gptq_config(4, -1, symmetric=False),
        gptq(bits=4, size=-1, symmetric=False, version=1),
    ),
    "awq": (AWQ, awq(32)),
    "w8a8 int8 channel": compressed_case("int-quantized", strategy="channel"),
    "int8 tensor, asymmetric": compressed_case("int-quantized", strategy="tensor", symmetric=False),
    "int8 groups": compressed_case("naive-quantized", strategy="group", group_size=32),
    "ct fp8 tensor": compressed_case("float-quantized", strategy="tensor", type="float"),
    "ct fp8 channel": compressed_case("float-quantized", strategy="channel", type="float"),
    "ct fp8 blocks": compressed_case("float-quantized", strategy="block", block_structure=[32, 32], type="float"),
    "w4a16": compressed_case("pack-quantized", strategy="group", group_size=32, num_bits=4),
    "w4a16 asymmetric": compressed_case("pack-quantized", strategy="group", group_size=32, num_bits=4, symmetric=False),
    "w4a16 act-order": compressed_case("pack-quantized", strategy="group", group_size=32, num_bits=4, reorder=True),
    "w8a16 channel, asymmetric": compressed_case("pack-quantized", strategy="channel", symmetric=False),
    "nf4": (NF4, bitsandbytes("nf4", nested=False)),
    "nf4 nested": (NF4 | {"bnb_4bit_use_double_quant": True}, bitsandbytes("nf4", nested=True)),
    "fp4 nested": (BNB | {"bnb_4bit_quant_type": "fp4"}, bitsandbytes("fp4", nested=True, block=128)),
    "bnb int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]},
        int8_rows,
    ),
}


def read_part(part: TensorInfo, raw: Tensor, start: int, counted: bool) -> None:
    data = part.file.read_bytes()[part.offset + start :][: raw.numel()]
    raw.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def values_of(info: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    target = torch.full(info.shape, torch.nan, dtype=dtype)
    read_dequantized(info, target, read_part)
    return target


def quantised_tensors(path: Path) -> dict[str, QuantizedTensor]:
    checkpoint, _ = present(read_safetensors(path), json.loads((path / "config.json").read_text()))
    return {name: info for name, info in checkpoint.tensors.items() if isinstance(info, QuantizedTensor)}


@pytest.fixture
def written(tiny_llama: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """Writes a case: the quantised folder, and its twin."""

    def make(case: str, **changes: Any) -> tuple[Path, Path]:
        config, quantise = CASES[case]
        return write(tiny_llama(num_hidden_layers=2), config | changes, quantise)

    return make


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits_are_those_of_the_dequantised_twin(
    written: Callable[..., tuple[Path, Path]], case: str
) -> None:
    path, twin = written(case)
    wanted = load_file(twin / "model.safetensors")
    found = quantised_tensors(path)
    assert sorted(found) == sorted(name for name in wanted if name.endswith("_proj.weight"))
    for name, info in found.items():
        assert info.shape == wanted[name].shape
        assert torch.allclose(values_of(info), wanted[name], rtol=2e-7, atol=0), name
        for begin, end in ((3, 4), (5, 31)):  # as a head is read, in blocks of rows
            part = values_of(info.rows(begin, end).rows(0, end - begin), torch.bfloat16)
            assert torch.equal(part, values_of(info)[begin:end].bfloat16()), name
    prompts = random_prompts()[:4]
    pairs = zip(*(logits_of(transformer_of(load(folder)), prompts) for folder in (path, twin)), strict=True)
    assert max(relative_error(ours, theirs) for ours, theirs in pairs) < 1e-5
