"""Quantized checkpoints seen as plain ones, from headers alone: whatever they say, a weight or a clear refusal."""

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.errors import ModelError, ModelUnsupported
from rbee_worker.runtime.formats.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from rbee_worker.runtime.formats.quantized.methods import present
from rbee_worker.runtime.formats.quantized.tensor import QuantizedTensor, is_idle_bias, names

FILE = Path("model.safetensors")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
PACKED = {"num_bits": 4, "group_size": 32, "symmetric": False}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "first": {"targets": ["Linear"], "weights": PACKED},
        "second": {"targets": ["re:.*down_proj"], "weights": PACKED | {"num_bits": 8}},
    },
}
CONFIGS: list[dict[str, Any]] = [
    GPTQ,
    AWQ,
    COMPRESSED,
    {"quant_method": "fp8"},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
]
PARTS = [
    *("qweight", "qzeros", "scales", "g_idx", "weight", "weight_scale", "weight_scale_inv", "weight_packed"),
    *("weight_shape", "weight_zero_point", "weight_g_idx", "SCB", "weight_format", "bias"),
]
ODD_VALUES = [None, True, 0, -1, 1, 2**70, "x", "", [], [1], [1, 2], {}, {"a": 1}, 1.5, math.inf]
SIZES = st.sampled_from([0, 1, 2, 3, 8, 12, 32, 64, 96, 2**40])


def checkpoint(parts: dict[str, tuple[str, tuple[int, ...]]]) -> Checkpoint:
    infos = (
        TensorInfo(name, shape, dtype, FILE, 8, math.prod(shape) * DTYPE_BYTES[dtype])
        for name, (dtype, shape) in parts.items()
    )
    return Checkpoint(MappingProxyType({info.name: info for info in infos}), (FILE,))


def shown(parts: dict[str, tuple[str, tuple[int, ...]]], config: dict[str, Any]) -> tuple[Checkpoint, str]:
    return present(checkpoint(parts), {"quantization_config": config})


@given(
    config=st.sampled_from(CONFIGS),
    odd=st.dictionaries(st.sampled_from([*GPTQ, *COMPRESSED, "ignore", "version", "sym"]), st.sampled_from(ODD_VALUES)),
    parts=st.dictionaries(
        st.sampled_from(PARTS),
        st.tuples(
            st.sampled_from(["I32", "F16", "F32", "I8", "U8", "F8_E4M3", "I64"]),
            st.lists(SIZES, max_size=3).map(tuple),
        ),
    ),
)
def test_any_header_gives_weights_of_a_true_shape_or_a_refusal(
    config: dict[str, Any], odd: dict[str, Any], parts: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    try:
        found, _ = shown({f"m.{name}": part for name, part in parts.items()}, config | odd)
    except ModelError:
        return
    for info in found.tensors.values():
        if isinstance(info, QuantizedTensor):
            assert len(info.shape) == 2
            assert min(info.shape) > 0
            assert info.nbytes == sum(part.nbytes for part in info.parts.values())


def test_a_rule_for_a_name_comes_before_one_for_a_class() -> None:
    def parts(module: str, per_word: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            f"{module}.weight_packed": ("I32", (16, 64 // per_word)),
            f"{module}.weight_scale": ("F16", (16, 2)),
            f"{module}.weight_zero_point": ("I32", (16 // per_word, 2)),
            f"{module}.weight_shape": ("I64", (2,)),
        }

    found, stored_as = shown(parts("mlp.down_proj", 4) | parts("mlp.up_proj", 8), COMPRESSED)
    assert {name: info.shape for name, info in found.tensors.items()} == {
        "mlp.down_proj.weight": (16, 64),
        "mlp.up_proj.weight": (16, 64),
    }
    both = ("8-bit, groups of 32", "4-bit, groups of 32")
    assert stored_as == "; ".join(f"compressed-tensors {what}" for what in both) + ", dequantized"


def test_what_is_not_quantized_stays_as_it_is() -> None:
    plain = checkpoint({"m.weight": ("BF16", (4, 4)), "norm.weight": ("F32", (4,))})
    assert present(plain, {}) == (plain, "BF16, F32")
    found, stored_as = present(plain, {"quantization_config": GPTQ})
    assert (dict(found.tensors), stored_as) == (dict(plain.tensors), "BF16, F32")


@pytest.mark.parametrize(
    ("pattern", "module", "meant"),
    [
        ("lm_head", "lm_head", True),
        ("gate", "model.layers.0.mlp.gate", True),
        ("gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("re:.*up_proj$", "model.layers.1.mlp.up_proj", True),
        ("re:up_proj", "model.layers.1.mlp.up_proj", False),
    ],
)
def test_entries_of_lists_mean_whole_components_of_names(pattern: str, module: str, *, meant: bool) -> None:
    assert names(pattern, module) is meant


def test_a_method_that_is_not_known_is_named() -> None:
    with pytest.raises(ModelUnsupported, match=r"config\.json: the checkpoint is quantized \(spqr\), which") as caught:
        shown({"a.weight": ("F32", (2, 2))}, {"quant_method": "spqr"})
    assert "Read are fp8, " in str(caught.value)


INT8_GROUP = {"targets": ["re:.*up_proj"], "weights": {"num_bits": 8, "strategy": "channel"}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AWQ | {"backend": "llm-awq"}, r"backend.*'llm-awq'.*gemm layout is read"),
        ({"quant_method": "fp8", "ignored_layers": [1]}, r"config\.ignored_layers is not a list of names"),
        (COMPRESSED | {"config_groups": {}}, r"config_groups names no weights"),
        (COMPRESSED | {"config_groups": {"a": {"targets": ["Linear"], "weights": None}}}, r"names no weights"),
        (
            COMPRESSED | {"config_groups": {"a": {"targets": ["Linear"], "weights": PACKED | {"type": "float"}}}},
            r"weights: float by group is not read packed",
        ),
        (
            COMPRESSED | {"format": "int-quantized", "config_groups": {"a": INT8_GROUP}},
            r"tensor 'm\.down_proj\.weight' is quantized, but no config group .* targets its module",
        ),
    ],
)
def test_what_a_config_says_wrong_is_named(config: dict[str, Any], message: str) -> None:
    parts = {f"m.{name}.weight": ("I8", (16, 64)) for name in ("up_proj", "down_proj")}
    parts |= {f"m.{name}.weight_scale": ("F32", (16, 1)) for name in ("up_proj", "down_proj")}
    with pytest.raises(ModelError, match=message):
        shown(parts, config)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_scales_of_activations_are_left_out(method: str) -> None:
    scale = {"fp8": "weight_scale_inv", "compressed-tensors": "weight_scale"}[method]
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config: dict[str, Any] = {"quant_method": method}
    if method != "fp8":
        config |= {"format": "float-quantized", "config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
    parts = {"m.weight": ("F8_E4M3", (16, 64)), f"m.{scale}": ("F32", ()), "m.input_scale": ("F32", ())}
    found, _ = shown(parts, config)
    assert set(found.tensors) == {"m.weight"}
    assert isinstance(found.tensors["m.weight"], QuantizedTensor)


def test_a_bias_that_cannot_be_looked_at_is_named() -> None:
    packed = {"m.qweight": ("I32", (8, 96)), "m.qzeros": ("I32", (2, 12)), "m.scales": ("F16", (2, 96))}
    found, _ = shown(packed | {"m.bias": ("F16", (96,))}, GPTQ)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read: No such file"):
        is_idle_bias(found, "m.bias")
    huge, _ = shown(packed | {"m.bias": ("F16", (2**40,))}, GPTQ)
    with pytest.raises(ModelError, match=r"tensor 'm\.bias' is 2199023255552 bytes, too many for what it should hold"):
        is_idle_bias(huge, "m.bias")
