"""Conversion to a Hugging Face folder: values, layout, and what a killed or refused one leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file

from rbee_worker.config import DTypeName
from rbee_worker.errors import ModelUnsupported, Remedy
from rbee_worker.runtime import convert as convert_module
from rbee_worker.runtime.convert import (
    ConvertProgress,
    bfloat16_to_float32,
    convert,
    float32_to_bfloat16,
)
from rbee_worker.runtime.formats.gguf.model import dequantize
from rbee_worker.runtime.formats.safetensors import read_header
from rbee_worker.runtime.source import ModelSource, resolve

Folder = Callable[..., Path]

ALL_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- the real model


@pytest.fixture(scope="session")
def converted(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ConvertProgress]]:
    out = tmp_path_factory.mktemp("converted") / "SmolLM2"
    return out, list(convert(resolve(str(real_gguf)), out))


def test_the_real_model_converted(converted: tuple[Path, list[ConvertProgress]], real_gguf: Path) -> None:
    out, _ = converted
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(real_gguf).tensors}
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        assert len(file.keys()) == len(stored) == 272
        for ours, theirs in {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
            "model.layers.10.self_attn.v_proj.weight": "blk.10.attn_v.weight",
        }.items():
            rows = slice(0, 1000)  # of the embedding's 49,152: the reference takes its time
            expected = gguf.dequantize(stored[theirs].data[rows], stored[theirs].tensor_type)
            read = file.get_tensor(ours)
            np.testing.assert_array_equal(read[rows], expected.astype(read.dtype))
            assert read.shape == (*stored[theirs].shape[::-1],)
        for part, heads in (("q", 9), ("k", 3)):
            tensor = stored[f"blk.3.attn_{part}.weight"]
            permuted = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
            read = file.get_tensor(f"model.layers.3.self_attn.{part}_proj.weight")
            for head in range(heads):
                for i in (0, 1, 31):
                    np.testing.assert_array_equal(read[64 * head + i], permuted[64 * head + 2 * i])
                    np.testing.assert_array_equal(read[64 * head + 32 + i], permuted[64 * head + 2 * i + 1])


def test_the_real_model_reads_back(converted: tuple[Path, list[ConvertProgress]], real_gguf: Path) -> None:
    out, progress = converted
    before, after = resolve(str(real_gguf)), resolve(str(out))
    assert after.format == "safetensors"
    assert after.config == before.config
    assert after.generation_config == before.generation_config
    assert after.chat_templates.get("default") == before.chat_templates.get("default") is not None
    assert after.tokenizer.to_str() == before.tokenizer.to_str()
    shapes = {name: info.shape for name, info in before.checkpoint.tensors.items()}
    assert {name: info.shape for name, info in after.checkpoint.tensors.items()} == shapes
    assert set(after.checkpoint.dtypes) == {"F16", "F32"}
    assert progress[-1].bytes_written == (out / "model.safetensors").stat().st_size


# -- progress and layout


def test_progress_and_files(tiny: ModelSource, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    steps = list(convert(tiny, out))
    assert names(out) == ALL_FILES
    assert [step.tensors_done for step in steps] == [*range(12), 11]
    assert {step.tensors_total for step in steps} == {11}
    assert [step.finished for step in steps] == [False] * 12 + [True]
    written = [step.bytes_written for step in steps]
    assert written == sorted(written)
    assert written[-1] == steps[0].bytes_total == (out / "model.safetensors").stat().st_size
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("dtype", "expected", "torch_dtype"),
    [
        ("auto", {"q_proj": "F16", "up_proj": "BF16", "norm": "F32"}, "float16"),
        ("bfloat16", {"q_proj": "BF16", "up_proj": "BF16", "norm": "BF16"}, "bfloat16"),
        ("float16", {"q_proj": "F16", "up_proj": "F16", "norm": "F16"}, "float16"),
        ("float32", {"q_proj": "F32", "up_proj": "F32", "norm": "F32"}, "float32"),
    ],
)
def test_dtypes(
    tiny: ModelSource, tmp_path: Path, dtype: DTypeName, expected: dict[str, str], torch_dtype: str
) -> None:
    list(convert(tiny, tmp_path / "out", dtype=dtype))
    after = resolve(str(tmp_path / "out"))
    dtypes = {name.split(".")[-2]: info.dtype for name, info in after.checkpoint.tensors.items()}
    assert {part: dtypes[part] for part in expected} == expected
    assert after.config["torch_dtype"] == torch_dtype


def test_values_and_row_order(tiny: ModelSource, tmp_path: Path) -> None:
    list(convert(tiny, tmp_path / "out", dtype="float32"))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        for name, info in tiny.checkpoint.tensors.items():
            data = np.fromfile(tiny.path, dtype=np.uint8, count=info.nbytes, offset=info.offset)
            np.testing.assert_array_equal(file.get_tensor(name), dequantize(info, data))


def test_tensors_are_aligned(model_folder: Folder, files: SimpleNamespace, tmp_path: Path) -> None:
    odd = {
        "a": ("F16", [3], bytes(6)),
        "b": ("U8", [1], b"\1"),
        "c": ("F32", [1], bytes(4)),
        "d": ("F64", [], bytes(8)),
    }
    folder = model_folder(**{"model.safetensors": files.safetensors_bytes(odd)})
    list(convert(resolve(str(folder)), tmp_path / "out"))
    tensors, metadata = read_header(tmp_path / "out" / "model.safetensors")
    assert [info.offset % width for info, width in zip(tensors.values(), (8, 4, 2, 1), strict=True)] == [0, 0, 0, 0]
    assert [info.dtype for info in tensors.values()] == ["F64", "F32", "F16", "U8"]
    assert metadata["format"] == "pt"


def test_a_safetensors_model_is_copied_byte_for_byte(
    model_folder: Folder, files: SimpleNamespace, tmp_path: Path
) -> None:
    data = {"f8": ("F8_E4M3", [2], b"\1\2"), "i": ("I64", [1], b"\3" * 8), "bf": ("BF16", [2], b"\xc0\x7f\1\0")}
    config = {"dtype": "bfloat16", "model_type": "llama", "extra": "é"}
    folder = model_folder(
        **{
            "model.safetensors": files.safetensors_bytes(data),
            "config.json": json.dumps(config).encode(),
            "chat_template.jinja": b"J",
        }
    )
    list(convert(resolve(str(folder)), tmp_path / "out"))
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    for name, info in read_header(tmp_path / "out" / "model.safetensors")[0].items():
        assert (info.dtype, list(info.shape), raw[info.offset : info.offset + info.nbytes]) == data[name]
    after = resolve(str(tmp_path / "out"))
    assert after.config == {"torch_dtype": "bfloat16", "model_type": "llama", "extra": "é"}
    assert after.chat_templates.get("default") == "J"
    assert (after.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_several_templates_are_kept(model_folder: Folder, tmp_path: Path) -> None:
    folder = model_folder(**{"chat_template.jinja": b"D"})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    list(convert(resolve(str(folder)), tmp_path / "out"))
    assert resolve(str(tmp_path / "out")).chat_templates == {"default": "D", "rag": "R"}


def test_a_tensor_of_many_chunks(tmp_path: Path, model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "_CHUNK_ELEMENTS", 10)
    folder = model_folder()
    arrays = {
        "w": np.random.default_rng(0).standard_normal((7, 3, 2)).astype(np.float64),
        "s": np.array(0.5, np.float32),
    }
    arrays["e"] = np.zeros((0, 4), np.float32)
    save_file(arrays, folder / "model.safetensors")
    list(convert(resolve(str(folder)), tmp_path / "out", dtype="float32"))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array.astype(np.float32))


# -- rounding


def reference_bfloat16(value: np.float32) -> int:
    """The nearest of the two neighbours, the even one on a tie."""
    bits = int(np.float32(value).view(np.uint32))
    low, rest = bits >> 16, bits & 0xFFFF
    if np.isnan(value):
        return low | 0x40
    return low + (rest > 0x8000 or (rest == 0x8000 and low & 1 == 1))


@given(values=hnp.arrays(np.uint32, st.integers(0, 20), elements=st.integers(0, 2**32 - 1)))
def test_bfloat16_rounds_to_nearest_even(values: npt.NDArray[np.uint32]) -> None:
    floats = values.view(np.float32)
    expected = [reference_bfloat16(value) for value in floats]
    assert float32_to_bfloat16(floats).tolist() == expected


def test_bfloat16_of_known_values() -> None:
    values = np.array([1.0, -2.0, 1.00390625, 1.01171875, np.inf, -np.inf, 0.0, -0.0, 3.4e38], dtype=np.float32)
    assert [hex(bits) for bits in float32_to_bfloat16(values)] == [
        "0x3f80", "0xc000", "0x3f80", "0x3f82", "0x7f80", "0xff80", "0x0", "0x8000", "0x7f80",
    ]  # fmt: skip
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(np.array([np.nan], np.float32))))[0]


def test_bfloat16_bits_survive() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    floats = bfloat16_to_float32(bits)
    number = ~np.isnan(floats)
    np.testing.assert_array_equal(float32_to_bfloat16(floats)[number], bits[number])


@pytest.mark.parametrize(
    ("value", "dtype", "written"),
    [(65519.0, "float16", 65504.0), (-65519.0, "float16", -65504.0), (np.inf, "float16", np.inf)],
)
def test_values_that_still_fit(
    model_folder: Folder, tmp_path: Path, value: float, dtype: DTypeName, written: float
) -> None:
    folder = model_folder()
    save_file({"w": np.array([value], np.float32)}, folder / "model.safetensors")
    list(convert(resolve(str(folder)), tmp_path / "out", dtype=dtype))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.get_tensor("w")[0] == written


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.float32(65520.0), "float16", "holds 65520, too large for float16."),
        (np.float32(-7e4), "float16", "holds 70000, too large for float16."),
        (np.float32(3.4e38), "bfloat16", "holds 3.4e+38, too large for bfloat16."),
        (np.float64(1e300), "float32", "holds 1e+300, too large for float32."),
    ],
)
def test_values_that_do_not_fit(
    model_folder: Folder, tmp_path: Path, value: np.floating, dtype: DTypeName, message: str
) -> None:
    folder = model_folder()
    save_file({"w": np.array([value])}, folder / "model.safetensors")
    with pytest.raises(ModelUnsupported) as caught:
        list(convert(resolve(str(folder)), tmp_path / "out", dtype=dtype))
    assert caught.value.message == f"model.safetensors: tensor 'w' {message}"
    assert caught.value.exit_code == 4
    assert names(tmp_path / "out") == []


def test_scaled_8_bit_floats_are_only_copied(model_folder: Folder, files: SimpleNamespace, tmp_path: Path) -> None:
    data = files.safetensors_bytes({"f8": ("F8_E4M3", [2], b"\1\2")})
    source = resolve(str(model_folder(**{"model.safetensors": data})))
    with pytest.raises(ModelUnsupported, match="tensor 'f8' is stored as F8_E4M3") as caught:
        convert(source, tmp_path / "out", dtype="float16")
    assert caught.value.remedies == (Remedy({"dtype": "auto"}),)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_checkpoints_are_only_copied(model_folder: Folder, tmp_path: Path, key: str) -> None:
    section = {"quant_method": "compressed-tensors"}
    source = resolve(str(model_folder(**{"config.json": json.dumps({"model_type": "llama", key: section}).encode()})))
    with pytest.raises(ModelUnsupported, match="tiny is quantized; in float16 its scales would be rounded") as caught:
        convert(source, tmp_path / "out", dtype="float16")
    assert caught.value.hint == "Copy it as it is."
    assert caught.value.remedies == (Remedy({"dtype": "auto"}),)
    list(convert(source, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == section
