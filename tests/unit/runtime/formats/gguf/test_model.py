"""GGUF files as Hugging Face models: header, names, config, rotary layout, decoding."""

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.gguf.model import TENSOR_TYPES, GGUFModel, dequantize, llama3_divisors, read_gguf
from rbee_worker.runtime.tokenizer.gguf import read_tokenizer, tokenizer_config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def stored(model: GGUFModel, name: str) -> tuple[TensorInfo, np.ndarray]:
    info = model.checkpoint.tensors[name]
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        return info, np.frombuffer(stream.read(info.nbytes), dtype=np.uint8)


# -- names and config


def test_names_and_shapes_are_hugging_faces(path: Path, files: SimpleNamespace) -> None:
    tensors = files.llama_tensors(260)
    checkpoint = read_gguf(files.write_gguf(path, tensors=tensors)).checkpoint
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        "model.embed_tokens.weight": (260, 64),
        "model.norm.weight": (64,),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
        "model.layers.0.self_attn.v_proj.weight": (32, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.layers.0.mlp.gate_proj.weight": (96, 64),
        "model.layers.0.mlp.up_proj.weight": (96, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 96),
    }
    permuted = {name.split(".")[-2]: info.rope_heads for name, info in checkpoint.tensors.items() if info.rope_heads}
    assert permuted == {"q_proj": 4, "k_proj": 2}
    assert sum(info.parameters for info in checkpoint.tensors.values()) == sum(array.size for array in tensors.values())
    assert checkpoint.files == (path,)


def test_config(path: Path, files: SimpleNamespace) -> None:
    model = read_gguf(files.write_gguf(path, metadata={"tokenizer.ggml.padding_token_id": 0}))
    assert model.config() == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "vocab_size": 260,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": 258,
        "eos_token_id": 259,
        "pad_token_id": 0,
    }


def test_config_of_the_real_model(real_gguf: Path) -> None:
    config = read_gguf(real_gguf).config()
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert (config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (100000.0, 1e-05, True)


def test_an_output_tensor_unties(path: Path, files: SimpleNamespace) -> None:
    tensors = files.llama_tensors(260)
    tensors["output.weight"] = tensors["token_embd.weight"] * 2
    model = read_gguf(files.write_gguf(path, tensors=tensors))
    assert model.config()["tie_word_embeddings"] is False
    assert model.checkpoint.tensors["lm_head.weight"].shape == (260, 64)


def test_kv_heads_default_to_heads(path: Path, files: SimpleNamespace) -> None:
    tensors = files.llama_tensors(260)
    tensors["blk.0.attn_k.weight"] = tensors["blk.0.attn_v.weight"] = np.zeros((64, 64), np.float32)
    model = read_gguf(files.write_gguf(path, tensors=tensors, drop=["llama.attention.head_count_kv"]))
    assert model.config()["num_key_value_heads"] == 4
    assert model.checkpoint.tensors["model.layers.0.self_attn.k_proj.weight"].rope_heads == 4


def test_biases_are_named_and_said(path: Path, files: SimpleNamespace) -> None:
    tensors = files.llama_tensors(260)
    tensors["blk.0.attn_q.bias"] = np.arange(64, dtype=np.float32)
    model = read_gguf(files.write_gguf(path, tensors=tensors))
    assert model.config()["attention_bias"] is True
    info, data = stored(model, "model.layers.0.self_attn.q_proj.bias")
    assert dequantize(info, data)[:16].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": 0}, "llama.block_count is 0; it must be a whole number above 0."),
        ({"llama.block_count": "2"}, "llama.block_count is '2'; it must be a whole number above 0."),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0;"),
        ({"llama.attention.head_count": 3}, "3 heads do not divide llama.embedding_length 64."),
        ({"llama.attention.head_count_kv": 3}, "tensor 'blk.0.attn_k.weight' has 32 rows, which 3 heads"),
        ({"llama.embedding_length": 63}, "4 heads do not divide llama.embedding_length 63."),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base is nan; it must be a number above 0."),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "llama.attention.layer_norm_rms_epsilon is -1.0;"),
        ({"tokenizer.ggml.eos_token_id": 260}, "tokenizer.ggml.eos_token_id is 260; the vocabulary has 260 tokens."),
    ],
)
def test_refuses_impossible_metadata(
    path: Path, files: SimpleNamespace, metadata: dict[str, Any], message: str
) -> None:
    model = read_gguf(files.write_gguf(path, metadata=metadata))
    with pytest.raises(ModelMalformed) as caught:
        model.config()
    assert caught.value.message.startswith(f"tiny.gguf: {message}")
    assert caught.value.exit_code == 3


def test_a_figure_given_for_each_layer_is_one_where_they_agree(path: Path, files: SimpleNamespace) -> None:
    one = read_gguf(files.write_gguf(path)).config()
    each = {"llama.feed_forward_length": [96], "llama.attention.head_count_kv": [2]}
    assert read_gguf(files.write_gguf(path, metadata=each)).config() == one


@pytest.mark.parametrize(
    "key", ["block_count", "context_length", "embedding_length", "attention.head_count", "feed_forward_length"]
)
def test_names_a_missing_key(path: Path, files: SimpleNamespace, key: str) -> None:
    model = read_gguf(files.write_gguf(path, drop=[f"llama.{key}"]))
    with pytest.raises(ModelMalformed, match=rf"^tiny\.gguf: llama\.{key} is None; it must be a whole number above 0"):
        model.config()


def test_names_a_missing_embedding(path: Path, files: SimpleNamespace) -> None:
    with pytest.raises(ModelMalformed, match=r"tiny\.gguf: there is no token_embd\.weight"):
        read_gguf(files.write_gguf(path, drop=["token_embd.weight"])).config()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"llama.rope.scaling.type": "longrope"},
            "llama.rope.scaling.type is 'longrope'; supported: none, linear, yarn,",
        ),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1},
            "'llama.rope.scaling.yarn_log_multiplier' is not supported",
        ),
        ({"llama.expert_count": 8}, "a mixture of 8 experts"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8; only the head size, 16, is"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length is 8; only the head size, 16, is"),
        ({"llama.feed_forward_length": [96, 64]}, "llama.feed_forward_length differs from layer to layer."),
    ],
)
def test_refuses_features_it_would_get_wrong(
    path: Path, files: SimpleNamespace, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelUnsupported) as caught:
        read_gguf(files.write_gguf(path, metadata=metadata)).config()
    assert caught.value.message.startswith(f"tiny.gguf: {message}")


def test_experts_lie_side_by_side(path: Path, files: SimpleNamespace) -> None:
    stacked = np.arange(3 * 2 * 32, dtype=np.float32).reshape(3, 2, 32)
    raw = {"blk.0.ffn_up_exps.weight": (gguf.quantize(stacked, Type.Q8_0), Type.Q8_0)}
    metadata = {"qwen3moe.expert_count": 3}
    model = read_gguf(files.write_gguf(path, architecture="qwen3moe", metadata=metadata, raw=raw))
    for number in range(3):
        info, data = stored(model, f"model.layers.0.mlp.experts.{number}.up_proj.weight")
        assert (info.shape, info.dtype, info.rope_heads) == ((2, 32), "Q8_0", 0)
        np.testing.assert_allclose(dequantize(info, data), stacked[number], atol=1)


@pytest.mark.parametrize("shape", [(4, 2, 32), (3, 32), (2, 32, 3, 32)])
def test_experts_are_as_many_as_the_metadata_says(path: Path, files: SimpleNamespace, shape: tuple[int, ...]) -> None:
    raw = {"blk.0.ffn_up_exps.weight": (np.ones(shape, np.float32), Type.F32)}
    metadata = {"qwen3moe.expert_count": 3}
    model = read_gguf(files.write_gguf(path, architecture="qwen3moe", metadata=metadata, raw=raw))
    with pytest.raises(ModelMalformed, match=r"'blk\.0\.ffn_up_exps\.weight' has shape .* of 3 experts"):
        _ = model.checkpoint


def test_names_an_unknown_architecture(path: Path, files: SimpleNamespace) -> None:
    with pytest.raises(ModelUnsupported, match="the architecture is 'mamba'; supported in GGUF files: llama") as caught:
        read_gguf(files.write_gguf(path, architecture="mamba"))
    assert caught.value.exit_code == 4


def test_names_a_leftover_tensor(path: Path, files: SimpleNamespace) -> None:
    tensors = files.llama_tensors(260) | {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    with pytest.raises(ModelUnsupported, match=r"tensor 'blk\.0\.attn_q_norm\.weight' is not part of a 'llama' model"):
        _ = read_gguf(files.write_gguf(path, tensors=tensors)).checkpoint


# -- rotary scaling


def test_linear_scaling(path: Path, files: SimpleNamespace) -> None:
    expected = {"rope_type": "linear", "type": "linear", "factor": 4.0}
    named = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert read_gguf(files.write_gguf(path, metadata=named)).config()["rope_scaling"] == expected
    old = {"llama.rope.scale_linear": 4.0}
    assert read_gguf(files.write_gguf(path, metadata=old)).config()["rope_scaling"] == expected
    none = {"llama.rope.scale_linear": 1.0, "llama.rope.scaling.type": "none"}
    assert "rope_scaling" not in read_gguf(files.write_gguf(path, metadata=none)).config()


def published_llama3_divisors(dim: int, theta: float, factor: float) -> list[float]:
    """Meta's apply_scaling, one frequency at a time."""
    divisors = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi / (1 / theta ** (i / dim))
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_divisors(factor: float) -> None:
    expected = published_llama3_divisors(128, 500000.0, factor)
    assert llama3_divisors(128, 500000.0, factor) == pytest.approx(expected)
    assert len({round(value, 3) for value in expected}) > 4  # kept, stretched, and several between


def rope_file(path: Path, files: SimpleNamespace, divisors: object) -> GGUFModel:
    tensors = files.llama_tensors(260) | {"rope_freqs.weight": np.asarray(divisors, dtype=np.float32)}
    return read_gguf(files.write_gguf(path, tensors=tensors, metadata={"llama.rope.freq_base": 500000.0}))


def test_llama3_scaling_is_recognised(path: Path, files: SimpleNamespace) -> None:
    model = rope_file(path, files, published_llama3_divisors(16, 500000.0, 32.0))
    assert model.config()["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in model.checkpoint.tensors


def test_other_frequency_tables_are_refused(path: Path, files: SimpleNamespace) -> None:
    assert "rope_scaling" not in rope_file(path, files, np.ones(8)).config()
    close = np.array(published_llama3_divisors(16, 500000.0, 32.0))
    close[4] *= 1.01
    with pytest.raises(ModelUnsupported, match=r"rope_freqs\.weight \(largest value 32\.?\d*\) is not Llama 3's"):
        rope_file(path, files, close).config()
    with pytest.raises(ModelMalformed, match=r"rope_freqs\.weight is F32 of shape \(9,\); it must be F32 of \(8,\)"):
        rope_file(path, files, np.ones(9)).config()


def test_a_frequency_table_that_is_no_numbers_or_not_there_is_refused(path: Path, files: SimpleNamespace) -> None:
    with pytest.raises(
        ModelMalformed, match=r"^tiny\.gguf: tensor 'rope_freqs\.weight' holds numbers that are not fin"
    ):
        rope_file(path, files, np.array([1.0] * 7 + [math.nan])).config()
    model = rope_file(path, files, np.ones(8))
    [table] = [tensor for tensor in model.header.tensors if tensor.name == "rope_freqs.weight"]
    os.truncate(path, table.offset + 31)
    with pytest.raises(ModelMalformed, match=r"^tiny\.gguf: the file ended while rope_freqs\.weight was read"):
        model.config()


def test_half_of_longrope_is_refused(path: Path, files: SimpleNamespace) -> None:
    tensors = files.llama_tensors(260) | {"rope_factors_long.weight": np.ones(8, np.float32)}
    with pytest.raises(ModelMalformed, match=r"^tiny\.gguf: there is no rope_factors_\w+\.weight beside the other"):
        read_gguf(files.write_gguf(path, tensors=tensors)).config()


# -- rows of q and k


def llama_cpp_layout(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: dimension i of half h of a head moves to place 2 i + h of that head."""
    size = len(weight) // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for half in range(2):
            for i in range(size // 2):
                out[head * size + 2 * i + half] = weight[head * size + half * size // 2 + i]
    return out


def rotate_half(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2)
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )


def rotate_pairs(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    even, odd = x[0::2], x[1::2]
    out = np.empty_like(x)
    out[0::2] = even * np.cos(angles) - odd * np.sin(angles)
    out[1::2] = odd * np.cos(angles) + even * np.sin(angles)
    return out


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_rotary_rows_are_put_back(path: Path, files: SimpleNamespace, kind: Type) -> None:
    rng = np.random.default_rng(3)
    originals = {"attn_q": rng.standard_normal((64, 64)).astype(np.float32)}
    originals["attn_k"] = rng.standard_normal((32, 64)).astype(np.float32)
    heads = {"attn_q": files.heads, "attn_k": files.kv_heads}
    raw = {
        f"blk.0.{name}.weight": (gguf.quantize(llama_cpp_layout(weight, heads[name]), kind), kind)
        for name, weight in originals.items()
    }
    model = read_gguf(files.write_gguf(path, raw=raw))
    for name, weight in originals.items():
        exact = gguf.dequantize(gguf.quantize(weight, kind), kind)  # blocks lie along rows, so rows move freely
        read = dequantize(*stored(model, f"model.layers.0.self_attn.{name[-1]}_proj.weight"))
        np.testing.assert_array_equal(read, exact)


def test_both_rotary_layouts_give_the_same_scores() -> None:
    rng = np.random.default_rng(5)
    query, key, x = rng.standard_normal((16, 8)), rng.standard_normal((16, 8)), rng.standard_normal(8)
    angles = 7 / 10000 ** (np.arange(8) / 8)
    half = rotate_half(query @ x, angles) @ rotate_half(key @ x, angles * 3)
    pairs = rotate_pairs(llama_cpp_layout(query, 1) @ x, angles) @ rotate_pairs(
        llama_cpp_layout(key, 1) @ x, angles * 3
    )
    assert half == pytest.approx(pairs)
    assert half != pytest.approx(rotate_half(llama_cpp_layout(query, 1) @ x, angles) @ rotate_half(key @ x, angles * 3))


# -- stored types


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_decodes_what_the_package_encodes(path: Path, files: SimpleNamespace, name: str) -> None:
    weight = np.random.default_rng(1).standard_normal((96, 64)).astype(np.float32)
    model = read_gguf(
        files.write_gguf(path, raw={"blk.0.ffn_up.weight": (gguf.quantize(weight, Type[name]), Type[name])})
    )
    info, data = stored(model, "model.layers.0.mlp.up_proj.weight")
    assert (info.dtype, info.shape) == (name, (96, 64))
    values = dequantize(info, data)
    assert (values.dtype, values.shape) == (np.float32, (96, 64))
    tolerance = {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2}.get(name, 0.4)
    np.testing.assert_allclose(values, weight, atol=tolerance)


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


Q4_SCALES = half(1) + half(0) + bytes([1] * 4 + [0] * 4 + [1] * 4)
COUNTING = [0.0] * 32 + [1.0] * 32 + [2.0] * 32 + [3.0] * 32

# One block of 256 each, by the layouts in ggml-common.h, with scales of one so that the values are the quants.
K_BLOCKS = {
    # d, dmin, 12 bytes of 6-bit scales and minimums, 128 of nibbles: low ones for 32 elements, then the high ones
    "Q4_K": (Q4_SCALES + b"\x21" * 128, [1.0] * 32 + [2.0] * 32),
    # the same with 32 bytes of fifth bits: bit 0 is that of the first 32 elements, bit 1 of the next
    "Q5_K": (Q4_SCALES + b"\x55" * 32 + b"\x21" * 128, [17.0] * 32 + [2.0] * 32),
    # 128 bytes of low nibbles, 64 of high pairs, 16 scales, d; values are offset by 32
    "Q6_K": (b"\x21" * 128 + b"\0" * 64 + b"\1" * 16 + half(1), [1.0 - 32] * 64 + [2.0 - 32] * 64),
    # 32 bytes of high bits, 64 of bit pairs, 12 of 6-bit scales offset by 32, d; no high bit: offset by 4
    "Q3_K": (b"\xff" * 32 + b"\xe4" * 64 + b"\x11" * 8 + b"\xaa" * 4 + half(1), COUNTING),
    # 16 bytes of 4-bit scales and minimums, 64 of bit pairs, d, dmin
    "Q2_K": (b"\1" * 16 + b"\xe4" * 64 + half(1) + half(0), COUNTING),
}  # fmt: skip


@pytest.mark.parametrize("name", K_BLOCKS)
def test_decodes_k_quants(tmp_path: Path, name: str) -> None:
    block, pattern = K_BLOCKS[name]
    info = TensorInfo("x", (2, 256), name, tmp_path / "x.gguf", 0, 2 * len(block))
    expected = np.tile(pattern, 256 // len(pattern))
    np.testing.assert_array_equal(dequantize(info, np.frombuffer(block * 2, np.uint8)), [expected, expected])


def test_every_type_of_the_table_is_tested() -> None:
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_BLOCKS} == TENSOR_TYPES


def test_names_a_stored_type_that_is_not_read(path: Path, files: SimpleNamespace) -> None:
    raw = {"blk.0.ffn_up.weight": (np.zeros((96, 36), np.uint8), Type.IQ4_NL)}
    with pytest.raises(ModelUnsupported) as caught:
        _ = read_gguf(files.write_gguf(path, raw=raw)).checkpoint
    assert caught.value.message.startswith(
        "tiny.gguf: tensor 'blk.0.ffn_up.weight' is stored as IQ4_NL; supported: BF16,"
    )


def test_dequantize_wants_all_bytes(tmp_path: Path) -> None:
    info = TensorInfo("x", (2,), "F32", tmp_path / "x.gguf", 0, 8)
    with pytest.raises(ModelMalformed, match=r"x\.gguf: tensor 'x' has 7 of its 8 bytes"):
        dequantize(info, np.zeros(7, np.uint8))


# -- tokens that end


def test_generation_config_lists_every_end(path: Path, files: SimpleNamespace) -> None:
    vocabulary = files.bpe_vocabulary(extra={"<end>": 3, "<|im_end|>": 3, "<turn>": 3, "<|eot_id|>": 1})
    metadata = {"tokenizer.ggml.eos_token_id": 257, "tokenizer.ggml.eot_token_id": 259}
    model = read_gguf(files.write_gguf(path, vocabulary=vocabulary, metadata=metadata))
    # <|im_end|> is a control token; <|eot_id|> is plain text here.
    assert model.generation_config() == {"bos_token_id": 258, "eos_token_id": [257, 259, 258]}
    assert model.config()["eos_token_id"] == 257
    assert read_gguf(files.write_gguf(path)).generation_config() == {"bos_token_id": 258, "eos_token_id": 259}


def test_tokenizer_config_and_template(path: Path, files: SimpleNamespace) -> None:
    metadata = {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.unknown_token_id": 257}
    model = read_gguf(files.write_gguf(path, metadata=metadata))
    assert model.chat_template() == "{{ messages }}"
    assert tokenizer_config(model) == {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|im_start|>",
        "chat_template": "{{ messages }}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 128,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
    }
    assert read_gguf(files.write_gguf(path)).chat_template() is None


def test_vocabulary_larger_than_the_embedding(path: Path, files: SimpleNamespace) -> None:
    model = read_gguf(files.write_gguf(path, tensors=files.llama_tensors(200)))
    with pytest.raises(ModelMalformed, match=r"tiny\.gguf: the vocabulary has 260 tokens but the embedding 200 rows"):
        read_tokenizer(model)
