"""Numbers that are not finite: in every stored form of a weight, told with the tensor before the load ends."""

import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rbee_worker.config import DTypeName, EngineConfig, Quantization
from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.events import Ready
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.finite import all_finite, check_finite
from rbee_worker.runtime.formats.stacked_experts import read_expert
from tests.tiny import write_tiny_model

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def load(path: Path, dtype: DTypeName = "float32", quantize: Quantization = "none") -> None:
    """A load to its end; what is told of it is what is raised."""
    config = EngineConfig(device="cpu", dtype=dtype, quantize=quantize)
    assert isinstance([*Engine(config).load(str(path))][-1], Ready)


def spoil(path: Path, name: str, value: float, stored: torch.dtype = torch.float32) -> Tensor:
    """Put a value near the end of a tensor; returns the tensor as it is stored."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    spoilt = tensors[name].double()
    spoilt.view(-1)[-3] = value
    tensors[name] = spoilt.to(stored)
    save_file(tensors, file)
    return tensors[name]


# -- the two maxima


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_pattern_of_bits_is_told_apart(dtype: torch.dtype) -> None:
    numbers = torch.arange(256**dtype.itemsize, dtype=torch.int32)
    every = (numbers.to(torch.uint8) if dtype.itemsize == 1 else numbers.to(torch.int16)).view(dtype)
    finite = every.double().isfinite()
    assert all_finite(every[finite])
    among = every[finite][:32].clone()
    for bad in every[~finite]:
        among[5] = bad
        assert not all_finite(among)
    assert all_finite(every[finite & (every.double() < 0)])
    assert all_finite(every[:0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_are_finite_and_what_follows_is_not(dtype: torch.dtype, sign: int) -> None:
    values = torch.tensor([1.0, torch.finfo(dtype).max * sign, -1.0], dtype=dtype)
    assert all_finite(values)
    values.view(INTEGERS[dtype.itemsize])[1] += 1
    assert not all_finite(values)
    values.view(INTEGERS[dtype.itemsize])[1] += 1
    assert values[1].isnan()
    assert not all_finite(values)


HELD = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", HELD, ids=str)
def test_what_is_refused_is_what_conversion_makes_infinite(stored: torch.dtype, held: torch.dtype) -> None:
    info = TensorInfo("t", (1,), "F32", Path("a.safetensors"), 0, 4)
    for exponent in range(-8, 130):
        for factor in (
            1.0,
            1.9921875,
            1.99951171875,
            1.999755859375,
            1.99999988079071044921875,
            2 - 2**-24,
            2 - 2**-30,
        ):
            value = torch.tensor([-factor * 2.0**exponent], dtype=torch.float64).to(stored)
            if not value.isfinite():
                continue
            try:
                check_finite(info, value, held)
            except ModelUnsupported:
                assert not value.to(held).isfinite()
            else:
                assert value.to(held).isfinite()


# -- weights


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2)
BAD = [(torch.float8_e4m3fn, NAN), *((dtype, bad) for dtype in FLOATS for bad in (NAN, INF, -INF))]


@pytest.mark.parametrize(("stored", "bad"), BAD, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_it_is_found_in_every_stored_dtype(model: Path, stored: torch.dtype, dtype: DTypeName, bad: float) -> None:
    first = spoil(model, DOWN, bad, stored).view(-1)[-3].item()
    with pytest.raises(ModelMalformed) as caught:
        load(model, dtype)
    assert caught.value.message == (
        f"model.safetensors: tensor '{DOWN}' holds numbers that are not finite: 1 of the 6144 that were read together, "
        f"the first of them {first}."
    )
    assert caught.value.hint is not None


PLACES = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.2.self_attn.k_proj.weight",
    DOWN,
)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [("float32", "none"), ("float16", "none"), ("bfloat16", "none"), ("auto", "int8")],
)
def test_it_is_found_in_every_part_of_a_model(model: Path, name: str, dtype: DTypeName, quantize: Quantization) -> None:
    load(model, dtype, quantize)
    spoil(model, name, NAN)
    with pytest.raises(ModelMalformed, match=rf"tensor '{name}' holds numbers that are not finite"):
        load(model, dtype, quantize)


def test_a_tensor_of_nothing_else_is_told_with_their_number(model: Path) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[DOWN].fill_(NAN)
    save_file(tensors, file)
    with pytest.raises(ModelMalformed, match="6144 of the 6144 that were read together, the first of them nan"):
        load(model, "float16")


def test_it_is_found_beyond_the_first_piece(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbee_worker.runtime.loading.copier._CONVERT_BYTES", 1024)
    spoil(model, DOWN, -INF)
    with pytest.raises(ModelMalformed, match=rf"'{DOWN}' .* 1 of the 256 that were read together, the first .* -inf"):
        load(model, "float32")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", DOWN])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_too_large_for_the_dtype_is_refused_with_those_that_hold_it(
    model: Path, name: str, stored: torch.dtype
) -> None:
    spoil(model, name, -131072.0, stored)
    with pytest.raises(ModelUnsupported) as caught:
        load(model, "float16")
    assert caught.value.message.startswith(
        f"model.safetensors: tensor '{name}' holds -131072, too large for float16 (at most 65504; 1 of the "
    )
    assert caught.value.hint == "Load the model in bfloat16 or float32."
    load(model, "bfloat16")
    load(model, "float32")


@pytest.mark.parametrize(
    ("value", "dtype", "hint"),
    [(3.4e38, "bfloat16", "Load the model in float32."), (1e300, "float32", None), (1e300, "bfloat16", None)],
)
def test_no_dtype_is_named_that_does_not_hold_it(model: Path, value: float, dtype: DTypeName, hint: str | None) -> None:
    spoil(model, DOWN, value, torch.float64)
    with pytest.raises(ModelUnsupported, match=f"too large for {dtype}") as caught:
        load(model, dtype)
    assert caught.value.hint == hint


def test_what_int8_holds_by_its_scale_is_no_overflow(model: Path) -> None:
    spoil(model, DOWN, 131072.0)
    load(model, "auto", "int8")


def test_what_rounds_to_the_largest_number_is_held(model: Path) -> None:
    spoil(model, DOWN, 65519.0)
    load(model, "float16")
    spoil(model, DOWN, 65520.0)
    with pytest.raises(ModelUnsupported, match="holds 65520, too large for float16"):
        load(model, "float16")


# -- quantized weights


def spoilt_block(kind: gguf.GGMLQuantizationType, values: np.ndarray, offset: int) -> np.ndarray:
    """Quantized rows, with NaN for the float16 at a byte of the last block."""
    data = gguf.quantize(values, kind)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data.reshape(-1, size)[-1, offset : offset + 2] = np.array([0x7E00], "<u2").view(np.uint8)
    return data


@pytest.mark.parametrize(
    ("kind", "offset"), [("Q8_0", 0), ("Q4_0", 0), ("Q4_1", 0), ("Q4_1", 2), ("Q5_1", 2), ("F16", -2)]
)
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_q.weight"])
def test_a_block_of_gguf_with_a_scale_that_is_no_number(
    tmp_path: Path, files: SimpleNamespace, *, name: str, kind: str, offset: int
) -> None:
    told = {"token_embd.weight": "model.embed_tokens", "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj"}[name]
    quantization, weights = gguf.GGMLQuantizationType[kind], files.llama_tensors(260)
    if kind == "F16":
        data = weights[name].astype(np.float16)
        data[-1, -1] = NAN
    else:
        data = spoilt_block(quantization, weights[name], offset)
    path = files.write_gguf(tmp_path / "tiny.gguf", tensors=files.llama_tensors(260), raw={name: (data, quantization)})
    for dtype in ("float32", "float16"):
        with pytest.raises(
            ModelMalformed, match=rf"tiny\.gguf: tensor '{told}\.weight' holds numbers that are not fin"
        ):
            load(path, dtype)


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_scale_of_an_eight_bit_matrix(model: Path, bad: float, dtype: DTypeName) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[DOWN] = tensors[DOWN].to(torch.float8_e4m3fn)
    scales = torch.ones(64, 1)
    tensors[f"{DOWN}_scale"] = scales
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    save_file(tensors, file)
    load(model, dtype)
    scales[9] = bad
    save_file(tensors, file)
    with pytest.raises(ModelMalformed, match=rf"model\.safetensors: tensor '{DOWN}' holds numbers that are not finite"):
        load(model, dtype)


def test_a_scale_of_experts_in_four_bits_that_means_no_number(tmp_path: Path) -> None:
    blocks, scales = torch.zeros(2, 4, 1, 16, dtype=torch.uint8), torch.full((2, 4, 1), 127, dtype=torch.uint8)
    stored = {"down_blocks": blocks, "down_scales": scales, "down_bias": torch.zeros(2, 4)}
    infos = {
        f"experts.{role}": TensorInfo(role, tuple(value.shape), "U8", tmp_path / "a.safetensors", 0, value.nbytes)
        for role, value in stored.items()
    }

    def read(info: TensorInfo, target: Tensor, _held: torch.dtype) -> None:
        target.copy_(stored[info.name][1])

    read_expert(infos, "down", 1, read, device=CPU, held=torch.float32)
    scales[1, 3, 0] = 255  # NaN, as the format says
    with pytest.raises(
        ModelMalformed, match=r"a\.safetensors: tensor 'down_scales' holds a scale of 255, which is no number"
    ):
        read_expert(infos, "down", 1, read, device=CPU, held=torch.float32)
