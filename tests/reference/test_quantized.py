"""Quantized checkpoints against their dequantized twins: the same weights, the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rbee_worker.config import EngineConfig
from rbee_worker.errors import ModelMalformed, ModelUnsupported, RbeeError
from rbee_worker.events import LoadingToVram, Ready
from rbee_worker.runtime.convert import convert
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.quantized.dequantize import read_dequantized
from rbee_worker.runtime.formats.quantized.methods import present
from rbee_worker.runtime.formats.quantized.tensor import QuantizedTensor
from rbee_worker.runtime.formats.safetensors import read_safetensors
from rbee_worker.runtime.inspection import inspect_model
from rbee_worker.runtime.loading import parts
from rbee_worker.runtime.source import resolve
from tests.engines import loaded

from .quantized import Quantize, awq, bitsandbytes, compressed, fp8, gptq, int8_rows, save, write
from .test_logits import logits_of, random_prompts, relative_error, transformer_of


def gptq_config(bits: int, size: int, *, symmetric: bool, **options: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "damp_percent": 0.1} | options


def compressed_case(layout: str, **weights: Any) -> tuple[dict[str, Any], Quantize]:
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

CASES: dict[str, tuple[dict[str, Any], Quantize]] = {
    "fp8 blocks": (FP8 | {"weight_block_size": [32, 40]}, fp8((32, 40), name="weight_scale_inv")),
    "fp8 in whole blocks": (FP8 | {"weight_block_size": [32, 32]}, fp8((32, 32), name="weight_scale_inv")),
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


def read_part(part: TensorInfo, raw: Tensor, start: int, _counted: bool) -> None:
    data = part.file.read_bytes()[part.offset + start :][: raw.numel()]
    raw.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def values_of(info: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    target = torch.full(info.shape, torch.nan, dtype=dtype)
    read_dequantized(info, target, dtype, read_part)
    return target


def quantized_tensors(path: Path) -> dict[str, QuantizedTensor]:
    checkpoint, _ = present(read_safetensors(path), json.loads((path / "config.json").read_text()))
    return {name: info for name, info in checkpoint.tensors.items() if isinstance(info, QuantizedTensor)}


@pytest.fixture
def written(tiny_llama: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """Writes a case: the quantized folder, and its twin."""

    def make(case: str, **changes: Any) -> tuple[Path, Path]:
        config, quantize = CASES[case]
        options = {name: changes.pop(name) for name in ("head", "shards") if name in changes}
        return write(tiny_llama(num_hidden_layers=2, **changes), config, quantize, **options)

    return make


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits_are_those_of_the_dequantized_twin(
    written: Callable[..., tuple[Path, Path]], case: str
) -> None:
    path, twin = written(case)
    wanted = load_file(twin / "model.safetensors")
    found = quantized_tensors(path)
    assert sorted(found) == sorted(name for name in wanted if name.endswith("_proj.weight"))
    for name, info in found.items():
        assert info.shape == wanted[name].shape
        assert torch.allclose(values_of(info), wanted[name], rtol=2e-7, atol=0), name
        for begin, end in ((3, 4), (5, 31)):  # as a head is read, in blocks of rows
            part = values_of(info.rows(begin, end).rows(0, end - begin), torch.bfloat16)
            assert torch.equal(part, values_of(info)[begin:end].bfloat16()), name
    prompts = random_prompts()[:4]
    pairs = zip(*(logits_of(transformer_of(loaded(folder)), prompts) for folder in (path, twin)), strict=True)
    assert max(relative_error(ours, theirs) for ours, theirs in pairs) < 1e-5


@pytest.mark.cpu_forms
@pytest.mark.parametrize("config", [{"dtype": "bfloat16"}, {"quantize": "int8"}], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("case", ["fp8 tensor", "gptq 4-bit v2, act-order", "awq", "nf4 nested"])
def test_packed_forms_and_a_quantized_head_in_blocks_of_rows(
    written: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, case: str, config: dict[str, Any]
) -> None:
    monkeypatch.setattr(parts, "_BLOCK_WEIGHTS", 1)  # then a block is as large as the largest matrix of a layer
    path, twin = written(case, head=True)
    ours, theirs = (logits_of(transformer_of(loaded(folder, **config)), [[1, 2, 3]])[0] for folder in (path, twin))
    assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("case", ["fp8 in whole blocks", "w4a16 asymmetric", "w8a8 int8 channel", "ct fp8 blocks"])
def test_transformers_computes_the_same(written: Callable[..., tuple[Path, Path]], case: str) -> None:
    from transformers import CompressedTensorsConfig, FineGrainedFP8Config

    path, _ = written(case)
    dequantize: Any = FineGrainedFP8Config if case.startswith("fp8") else CompressedTensorsConfig
    theirs = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=dequantize(dequantize=True)
    )
    prompts = random_prompts()[:3]
    with torch.inference_mode():
        wanted = [theirs(torch.tensor([prompt])).logits[0] for prompt in prompts]
    found = logits_of(transformer_of(loaded(path)), prompts)
    assert max(map(relative_error, found, wanted)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        {"load_in_8bit": True},
    ],
    ids=["nf4 nested", "fp4 kept as bfloat16", "int8"],
)
def test_bitsandbytes_as_transformers_saves_it(tiny_llama: Callable[..., Path], options: dict[str, Any]) -> None:
    from transformers import BitsAndBytesConfig

    # Rows of whole blocks: see quantized.py on the library's CPU kernel.
    plain = tiny_llama(num_hidden_layers=2, intermediate_size=128)
    theirs = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    path = plain.with_name("saved")
    theirs.save_pretrained(path)
    (path / "tokenizer.json").write_bytes((plain / "tokenizer.json").read_bytes())
    theirs = theirs.dequantize(dtype=torch.float32)
    prompts = random_prompts()[:3]
    with torch.inference_mode():
        wanted = [theirs(torch.tensor([prompt])).logits[0] for prompt in prompts]
    found = logits_of(transformer_of(loaded(path)), prompts)
    assert max(map(relative_error, found, wanted)) < 1e-5


def test_biases_that_autogptq_gives_to_every_module_may_be_zeros_and_nothing_else(
    written: Callable[..., tuple[Path, Path]],
) -> None:
    path, twin = written("gptq 4-bit asymmetric")
    tensors = load_file(path / "model.safetensors")
    modules = [name.removesuffix("qweight") for name in tensors if name.endswith("qweight")]
    biases = {f"{name}bias": torch.zeros(tensors[f"{name}qweight"].shape[1]).half() for name in modules}
    save(path, tensors | biases)
    ours, theirs = (logits_of(transformer_of(loaded(folder)), [[1, 2, 3]])[0] for folder in (path, twin))
    assert torch.equal(ours, theirs)
    biases[f"{UP}.bias"][5] = 0.5
    save(path, tensors | biases)
    with pytest.raises(ModelMalformed, match=r"1 tensors are not part of .*model.layers.1.mlp.up_proj.bias"):
        loaded(path)


def test_convert_keeps_a_quantized_checkpoint_as_it_is_or_refuses(
    written: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    path, _ = written("awq")
    out = tmp_path / "converted"
    with pytest.raises(ModelUnsupported, match="scales would be rounded"):
        convert(resolve(str(path)), out, dtype="bfloat16")
    # compressed-tensors once wrote its section under another key.
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "compression_config": config.pop("quantization_config")}))
    with pytest.raises(ModelUnsupported, match="scales would be rounded"):
        convert(resolve(str(path)), out, dtype="float16")
    assert list(convert(resolve(str(path)), out))[-1].finished
    ours, theirs = (logits_of(transformer_of(loaded(folder)), [[1, 2, 3]])[0] for folder in (out, path))
    assert torch.equal(ours, theirs)


def test_parts_may_be_in_different_shards(written: Callable[..., tuple[Path, Path]]) -> None:
    path, twin = written("gptq 4-bit asymmetric", shards=3)
    assert len(list(path.glob("*.safetensors"))) == 3
    ours, theirs = (logits_of(transformer_of(loaded(folder)), [[1, 2, 3]])[0] for folder in (path, twin))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("case", "stored_as"),
    [
        ("fp8 blocks", "fp8 (e4m3), blocks of 32x40, dequantized"),
        ("gptq 8-bit, act-order", "gptq 8-bit, groups of 16, reordered, dequantized"),
        ("awq", "awq 4-bit, groups of 32, dequantized"),
        ("w8a16 channel, asymmetric", "compressed-tensors 8-bit, a scale for each row, dequantized"),
        ("nf4 nested", "bitsandbytes nf4, blocks of 64, scales quantized, dequantized"),
    ],
)
def test_the_report_and_inspect_name_the_quantization(
    written: Callable[..., tuple[Path, Path]], case: str, stored_as: str
) -> None:
    path, twin = written(case, head="ignore" not in CASES[case][0])
    events = list(Engine(EngineConfig(device="cpu", dtype="float32")).load(str(path)))
    ready, last = events[-1], [event for event in events if isinstance(event, LoadingToVram)][-1]
    assert isinstance(ready, Ready)
    assert ready.report.stored_as == stored_as
    assert last.bytes_loaded == last.bytes_total == ready.report.bytes_read
    found, plain = (inspect_model(resolve(str(folder)), None) for folder in (path, twin))
    assert (found.stored_as, plain.stored_as) == (stored_as, "F32")
    assert found.parameters == plain.parameters
    assert found.dequantized_bytes == 2 * found.parameters
    assert ready.report.bytes_read <= found.file_bytes < plain.file_bytes * 2 / 3
    assert found.memory == plain.memory


def test_every_stored_byte_counts_once_when_a_head_is_read_in_blocks(
    written: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_BLOCK_WEIGHTS", 1)
    for case in ("awq", "gptq 4-bit", "w4a16"):
        path, _ = written(case, head=case != "w4a16")
        events = list(Engine(EngineConfig(device="cpu", dtype="bfloat16")).load(str(path)))
        last = [event for event in events if isinstance(event, LoadingToVram)][-1]
        assert last.bytes_loaded == last.bytes_total


UP = "model.layers.1.mlp.up_proj"


def group(**weights: Any) -> dict[str, Any]:
    said = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": said | weights}}}


@pytest.mark.parametrize(
    ("case", "change", "error", "text"),
    [
        ("awq", {"quant_method": "aqlm"}, ModelUnsupported, r"quantized \(aqlm\)"),
        ("awq", {"quant_method": "mxfp4"}, ModelUnsupported, r"quantized \(mxfp4\)"),
        ("awq", {"version": "gemv"}, ModelUnsupported, "version is 'gemv'"),
        ("awq", {"zero_point": False}, ModelUnsupported, "zero_point"),
        ("awq", {"modules_to_not_convert": ["up_proj"]}, ModelMalformed, "lists its module among those that are not"),
        ("gptq 4-bit", {"bits": 3}, ModelUnsupported, "bits is 3"),
        ("gptq 4-bit", {"checkpoint_format": "marlin"}, ModelUnsupported, "checkpoint_format is 'marlin'"),
        ("gptq 4-bit", {"dynamic": {"-:lm_head": {}}}, ModelUnsupported, "quantization_config.dynamic"),
        ("gptq 4-bit", {"group_size": 0}, ModelMalformed, "group_size"),
        ("gptq 4-bit", {"group_size": 64}, ModelMalformed, r"scales' has the shape .*imply \[2, 64\]"),
        ("fp8 blocks", {"weight_block_size": [32, -1]}, ModelMalformed, "weight_block_size"),
        ("fp8 blocks", {"weight_block_size": None}, ModelMalformed, r"weight_scale_inv' has the shape \[2, 3\]"),
        ("fp8 blocks", {"rotation": "hadamard"}, ModelUnsupported, "rotation is 'hadamard'"),
        ("w4a16", {"format": "nvfp4-pack-quantized"}, ModelUnsupported, "nvfp4-pack-quantized"),
        ("w4a16", {"transform_config": {"config_groups": {"a": 1}}}, ModelUnsupported, "transform_config"),
        ("w4a16", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ModelUnsupported, "sparse-24-bitmask"),
        ("w4a16", group(num_bits=6), ModelUnsupported, "num_bits is 6"),
        ("w4a16", group(symmetric=False), ModelMalformed, "weight_zero_point' is missing"),
        ("w4a16", group(outliers=True), ModelUnsupported, "weights.outliers is True"),
        ("w4a16", group(group_size=None), ModelMalformed, "groups have a size"),
        ("w4a16", group() | {"ignore": ["re:(a+)+b"]}, ModelUnsupported, "repeat"),
        ("w4a16", group() | {"ignore": ["re:("]}, ModelMalformed, "ignore"),
        ("w4a16", group() | {"ignore": ["re:.*mlp[.]up_proj"]}, ModelMalformed, "among those that are not"),
        ("w8a8 int8 channel", {"format": "float-quantized"} | group(num_bits=8, type="float"), ModelMalformed, "is I8"),
        ("nf4", {"load_in_8bit": True}, ModelMalformed, "sets both"),
        ("nf4", {"bnb_4bit_quant_type": "int4"}, ModelUnsupported, "'int4'"),
    ],
)
def test_options_that_cannot_be_read_are_refused_by_name(
    written: Callable[..., tuple[Path, Path]], case: str, change: dict[str, Any], error: type[RbeeError], text: str
) -> None:
    path, _ = written(case)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=text):
        loaded(path)
    with pytest.raises(error, match=text):
        inspect_model(resolve(str(path)), None)


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def state(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("case", "part", "value", "text"),
    [
        ("gptq 4-bit", "scales", None, r"model.safetensors: tensor 'model.layers.1.mlp.up_proj.scales' is missing"),
        ("gptq 4-bit", "scales", zeros(2, 96), "is I32; this quantization stores it as F32 or F16 or BF16"),
        ("gptq 4-bit", "scales", zeros(2, 95, dtype=torch.float16), r"shape \[2, 95\]; .* imply \[2, 96\]"),
        ("gptq 4-bit", "qzeros", zeros(2, 11), r"shape \[2, 11\]; .* imply \[2, 12\]"),
        ("gptq 4-bit", "g_idx", zeros(63), r"shape \[63\]; .* imply \[64\]"),
        ("gptq 4-bit", "g_idx", zeros(64) + 7, "names group 7; there are 2"),
        ("gptq 4-bit", "g_idx", zeros(64) - 2, "names group -2; there are 2"),
        ("gptq 4-bit", "qweight", zeros(8), r"shape \[8\]"),
        ("gptq 4-bit", "qweight", zeros(0, 96), r"shape \[0, 96\]"),
        ("gptq 4-bit", "weight", torch.zeros(96, 64), "is stored beside"),
        ("awq", "qweight", zeros(64, 13), r"scales' has the shape \[2, 96\]; .* imply \[2, 104\]"),
        ("fp8 tensor", "weight_scale", None, "weight_scale_inv' is missing"),
        ("fp8 blocks", "weight_scale_inv", torch.zeros(3, 3), r"shape \[3, 3\]; .* imply \[3, 2\]"),
        ("w4a16", "weight_shape", torch.tensor([96, 63]), r"says \[96, 63\]; the packed values are \[96, 64\]"),
        ("w4a16", "weight_scale", torch.zeros(96, 1), r"imply \[96, 2\]"),
        ("w4a16 asymmetric", "weight_zero_point", zeros(11, 2), r"imply \[12, 2\]"),
        ("bnb int8", "SCB", torch.zeros(64), r"imply \[96\]"),
        ("bnb int8", "SCB", None, "weight' is stored as I8"),
        ("nf4", "weight.quant_map", torch.zeros(15), r"imply \[16\]"),
        ("nf4", "weight.absmax", torch.zeros(95), r"imply \[96\]"),
        ("nf4", NF4_STATE, state("{"), "is not JSON"),
        ("nf4", NF4_STATE, state('{"blocksize": 64, "shape": [96, 63]}'), "rows of an odd length"),
        ("nf4", NF4_STATE, state('{"blocksize": 64, "shape": [960000, 96]}'), "has 3072 bytes"),
        ("nf4", NF4_STATE, state('{"blocksize": 0, "shape": [96, 64]}'), "blocksize is 0"),
        ("nf4", NF4_STATE, None, "tensors are not part of|has shape"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_with_tensor_and_figure(
    written: Callable[..., tuple[Path, Path]], case: str, part: str, value: Tensor | None, text: str
) -> None:
    path, _ = written(case)
    tensors = load_file(path / "model.safetensors")
    tensors.pop(f"{UP}.{part}", None)
    if value is not None:
        tensors[f"{UP}.{part}"] = value
    save(path, tensors)
    with pytest.raises((ModelMalformed, ModelUnsupported), match=text):
        loaded(path)


def test_plain_8_bit_floats_are_their_values(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama(num_hidden_layers=2)
    tensors = {name: tensor.to(torch.float8_e5m2) for name, tensor in load_file(path / "model.safetensors").items()}
    save(path, tensors)
    ours = transformer_of(loaded(path))
    save(path, {name: tensor.float() for name, tensor in tensors.items()})
    assert torch.equal(
        *(logits_of(transformer, [[1, 2, 3]])[0] for transformer in (ours, transformer_of(loaded(path))))
    )
