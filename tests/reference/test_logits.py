"""The decoder against transformers: the same logits, the same greedy tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.model.decoder import Batch, Transformer
from tests.engines import loaded

from .conftest import answer

PROMPTS = ["The capital of France is", "def fibonacci(n):\n    if n", "Once upon a time, in a land far away, 人"]
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "explicit head_dim": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "eps": {"rms_norm_eps": 1e-2},
    "theta": {"rope_theta": 500000.0},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def logits_of(transformer: Transformer, prompts: list[list[int]], chunk: int = 1000) -> list[Tensor]:
    """Logits of every token of every prompt, run together as one ragged batch, ``chunk`` tokens of each at a time."""
    caches = [transformer.new_cache(len(prompt)) for prompt in prompts]
    parts: list[list[Tensor]] = [[] for _ in prompts]
    for begin in range(0, max(map(len, prompts)), chunk):
        pieces = [(owner, prompt[begin : begin + chunk]) for owner, prompt in enumerate(prompts) if begin < len(prompt)]
        for owner, piece in pieces:
            caches[owner].reserve(len(piece))
        batch = Batch.of([(caches[owner], piece, len(piece)) for owner, piece in pieces], transformer.device)
        out = transformer.forward(batch)
        for (owner, piece), segment in zip(pieces, batch.segments, strict=True):
            parts[owner].append(out[segment.start : segment.start + segment.count])
            caches[owner].advance(prompts[owner], caches[owner].length + len(piece))
    for cache in caches:
        cache.release()
    return [torch.cat(part) for part in parts]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def transformer_of(engine: Engine) -> Transformer:
    assert engine.model is not None
    return engine.model.transformer


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (1, 7, 40, 23, 16, 17, 64)]


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_tiny_configs_give_the_reference_logits(tiny_llama: Callable[..., Path], changes: dict[str, Any]) -> None:
    path = tiny_llama(**changes)
    theirs = reference(path)
    transformer = transformer_of(loaded(path))
    prompts = random_prompts()
    with torch.inference_mode():
        expected = [theirs(torch.tensor([prompt])).logits[0] for prompt in prompts]
    for chunk in (1000, 16, 1):
        for ours, wanted in zip(logits_of(transformer, prompts, chunk), expected, strict=True):
            assert relative_error(ours, wanted) < 1e-4, f"in pieces of {chunk}"


def test_a_cache_that_grows_keeps_what_it_holds(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama(max_position_embeddings=1024)
    theirs, transformer = reference(path), transformer_of(loaded(path))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (700, 300)]
    for ours, prompt in zip(logits_of(transformer, prompts, 90), prompts, strict=True):
        with torch.inference_mode():
            assert relative_error(ours, theirs(torch.tensor([prompt])).logits[0]) < 1e-4


@pytest.mark.parametrize("changes", [CONFIGS["grouped"], CONFIGS["llama3 rope"]], ids=["grouped", "llama3 rope"])
def test_tiny_configs_give_the_reference_greedy_tokens(
    tiny_llama: Callable[..., Path], changes: dict[str, Any]
) -> None:
    path = tiny_llama(**changes)
    theirs = reference(path)
    engine = loaded(path, prefill_chunk=8)
    text = "ragged and long enough for chunks"
    ids = tokens_after(engine, text, 64)
    assert engine.model is not None
    prompt = torch.tensor([engine.model.tokenizer.encode(text)])
    expected = theirs.generate(prompt, max_new_tokens=64, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    assert ids == expected.tolist()


def tokens_after(engine: Engine, prompt: str, count: int) -> list[int]:
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    sequence = engine.submit(GenerationRequest(prompt=prompt, sampling=sampling))
    while not sequence.finished:
        engine.step()
    return sequence.tokens[sequence.prompt_tokens :]


def test_the_real_model_gives_the_reference_logits_and_tokens(model_dir: Path) -> None:
    theirs = reference(model_dir)
    engine = loaded(model_dir)
    assert engine.model is not None
    tokenizer = engine.model.tokenizer
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    with torch.inference_mode():
        expected = [theirs(torch.tensor([prompt])).logits[0] for prompt in prompts]
    for ours, wanted in zip(logits_of(transformer_of(engine), prompts), expected, strict=True):
        assert relative_error(ours, wanted) < 1e-4
    prompt = torch.tensor([prompts[0]])
    with torch.inference_mode():
        generated = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, eos_token_id=-1
        )
    assert tokens_after(engine, PROMPTS[0], 24) == generated[0, prompt.shape[1] :].tolist()


@pytest.mark.cpu_forms
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_forms_err_no_more_than_the_reference_does(tiny_llama: Callable[..., Path], dtype: str) -> None:
    path = tiny_llama()
    prompts = random_prompts()
    exact, rounded = reference(path), reference(path, getattr(torch, dtype))
    ours = logits_of(transformer_of(loaded(path, dtype)), prompts)
    for mine, prompt in zip(ours, prompts, strict=True):
        with torch.inference_mode():
            wanted = exact(torch.tensor([prompt])).logits[0]
            theirs = rounded(torch.tensor([prompt])).logits[0]
        assert relative_error(mine, wanted) < 1.5 * relative_error(theirs, wanted)


@pytest.mark.cpu_forms
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_real_model_knows_the_capital_of_france_in_sixteen_bits(model_dir: Path, dtype: str) -> None:
    assert "Paris" in answer(loaded(model_dir, dtype, max_context=256), "What is the capital of France?")


def test_shards_load_as_one_file_does(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama(shards="100KB")
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 1
    prompts = random_prompts()
    with torch.inference_mode():
        wanted = reference(path)(torch.tensor([prompts[2]])).logits[0]
    assert relative_error(logits_of(transformer_of(loaded(path)), prompts)[2], wanted) < 1e-4
