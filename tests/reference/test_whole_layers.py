"""A layer that is one call of the worker's own kernels has the bits of its operators, one by one."""

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from rbee_worker.kernels.library import cpu_kernels, missing_reason
from rbee_worker.runtime.model.decoder import Transformer
from tests.engines import loaded

from .families import CASES
from .test_families import FAMILIES, save
from .test_logits import logits_of, transformer_of
from .test_stored import stored

pytestmark = [
    pytest.mark.cpu_forms,
    pytest.mark.skipif(cpu_kernels() is None, reason=f"the kernels do not run here: {missing_reason()}"),
]

BY_OPERATOR = {
    "CohereForCausalLM",  # layer norms
    "Cohere2ForCausalLM",
    "GptOssForCausalLM",  # experts
    "MistralForCausalLM",  # as it is made here: heads of 12
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",  # a norm over all heads, and none before attention
    "Qwen3MoeForCausalLM",
    "StableLmForCausalLM",
}
"""Families with an operator that the kernels lack."""

PROMPTS = [list(range(3, 40)), [5], list(range(60, 77))]


def check(transformer: Transformer) -> None:
    whole = [logits_of(transformer, PROMPTS, chunk) for chunk in (1000, 9, 1)]
    for layer in transformer.layers:
        layer._whole = None
    for chunk, found in zip((1000, 9, 1), whole, strict=True):
        for mine, wanted in zip(found, logits_of(transformer, PROMPTS, chunk), strict=True):
            assert torch.equal(mine, wanted), chunk


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_the_bits_of_a_family_s_layers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    transformer = transformer_of(loaded(save(case, tmp_path / "model"), "float16", max_context=case.context))
    assert [layer._whole is not None for layer in transformer.layers] == [case.architecture not in BY_OPERATOR] * 4
    check(transformer)


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16"])
def test_the_bits_of_layers_of_blocks(kv_cache_dtype: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "model.gguf", Type.Q4_K, Type.Q8_0, Type.Q6_K)
    transformer = transformer_of(loaded(path, "auto", kv_cache_dtype=kv_cache_dtype))
    assert all(layer._whole is not None for layer in transformer.layers)
    check(transformer)


def test_after_layers_that_are_not_whole(tmp_path: Path) -> None:
    """What one of them adds waits for the next one's norm."""
    transformer = transformer_of(loaded(stored(tmp_path / "model.gguf", Type.Q8_0), "auto"))
    for layer in transformer.layers[::2]:
        layer._whole = None
    assert {layer._whole is None for layer in transformer.layers} == {False, True}
    check(transformer)
