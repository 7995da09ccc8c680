"""GGUF files of each family against the model that they were made from.

The files are made here by llama.cpp's conventions: the names of the package gguf, Gemma's norms stored as they are
multiplied, no permutation but Llama's, which ``tests/unit/runtime/formats/gguf/test_model.py`` covers.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rbee_worker.runtime.convert import convert
from rbee_worker.runtime.formats.gguf.families import ARCHITECTURES
from rbee_worker.runtime.source import resolve
from tests.engines import loaded

from . import families
from .families import LONG, Case, rope
from .test_families import assert_logits, fill, prompts_of, their_logits
from .test_logits import logits_of, transformer_of

GEMMA: dict[str, Any] = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
CASES: dict[str, Case] = {
    "qwen2": Case("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": Case("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3moe": Case(
        "Qwen3Moe",
        families.CASES["Qwen3Moe"].changes | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "phi3": Case("Phi3", {"sliding_window": 11, "partial_rotary_factor": 0.5}),
    "gemma2": Case("Gemma2", GEMMA | CAPS, offset_norms=True),
    "gemma3": Case("Gemma3", GEMMA | {"num_hidden_layers": 7}, offset_norms=True, config_class="Gemma3TextConfig"),
}
SCALED: dict[str, Case] = {
    "qwen2": Case(
        "Qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    ),
    "phi3": Case("Phi3", rope(**LONG) | {"original_max_position_embeddings": 20, "head_dim": 8}),
}
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
Stored = tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType | None]


def as_float32(_name: str, tensor: Tensor) -> Stored:
    return tensor.numpy(), None


def write(path: Path, arch: str, model: PreTrainedModel, store: Callable[[str, Tensor], Stored] = as_float32) -> Path:
    """A file of a model's tensors. ``store``: bytes of each, and the quantized type that they are."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim := getattr(config, "head_dim", config.hidden_size // config.num_attention_heads))
    writer.add_value_length(head_dim)
    scaling = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(scaling["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * scaling.get("partial_rotary_factor", 1)))
    if scaling["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
    if scaling["rope_type"] == "longrope":
        stretch = config.max_position_embeddings / config.original_max_position_embeddings
        factor = math.sqrt(1 + math.log(stretch) / math.log(config.original_max_position_embeddings))
        writer.add_rope_scaling_attn_factors(factor)
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(scaling[f"{kind}_factor"], dtype=np.float32))
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _add_experts(writer, arch, config)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in (part for item in model.state_dict().items() for part in _parts(*item)):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shift = 1.0 if arch.startswith("gemma") and name.endswith("norm.weight") else 0.0
        data, kind = store(name, tensor + shift)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def _add_experts(writer: gguf.GGUFWriter, arch: str, config: PreTrainedConfig) -> None:
    for key, name in EXPERTS.items():
        if hasattr(config, name):
            writer.add_uint32(f"{arch}.{key}", getattr(config, name))


def _parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """transformers has gate and up of all experts in one tensor, GGUF in two."""
    if name.endswith(".gate_up_proj") and tensor.dim() > 2:
        halves = zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True)
        return [(name.replace("gate_up_proj", f"{role}_proj.weight"), half.contiguous()) for role, half in halves]
    return [(f"{name}.weight" if tensor.dim() > 2 else name, tensor)]


@pytest.mark.parametrize(("arch", "case"), [*CASES.items(), *SCALED.items()])
def test_the_logits_are_those_of_the_model_it_was_made_from(arch: str, case: Case, tmp_path: Path) -> None:
    theirs = fill(case).eval()
    path = write(tmp_path / "model.gguf", arch, theirs)
    prompts = prompts_of(case)
    expected = their_logits(theirs, prompts)
    assert_logits(logits_of(transformer_of(loaded(path)), prompts), expected)
    for _ in convert(resolve(str(path)), tmp_path / "converted"):
        pass
    assert_logits(logits_of(transformer_of(loaded(tmp_path / "converted")), prompts), expected)


def test_every_family_is_proven() -> None:
    assert CASES.keys() == ARCHITECTURES.keys() - {"llama"}
