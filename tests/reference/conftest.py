"""Tiny random models saved by transformers, the beginning of the real one, and both implementations side by side."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.events import End
from rbee_worker.runtime.engine.engine import Engine
from tests.conftest import rewrite_json
from tests.engines import text
from tests.tiny import byte_tokenizer

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Callable[..., Path]:
    """Saves a random Llama of a given config, with a byte-level tokenizer beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def save(*, shards: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(TINY | changes))).to(dtype)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
        path = tmp_path / "tiny"
        model.save_pretrained(path, **({"max_shard_size": shards} if shards else {}))
        byte_tokenizer().save(str(path / "tokenizer.json"))
        return path

    return save


@pytest.fixture(scope="session")
def first_layers(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model's embedding, first three layers and head: trained weights of every kind, a tenth of the work."""
    layers = 3
    path = tmp_path_factory.mktemp("first") / "layers"
    shutil.copytree(model_dir, path)
    tensors = load_file(path / "model.safetensors")
    beyond = [name for name in tensors if (found := re.search(r"layers\.(\d+)\.", name)) and int(found[1]) >= layers]
    for name in beyond:
        del tensors[name]
    save_file(tensors, path / "model.safetensors")
    rewrite_json(path / "config.json", num_hidden_layers=layers)
    return path


def answer(engine: Engine, question: str, max_tokens: int = 24) -> str:
    """The likeliest answer of a chat model."""
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    events = list(engine.generate(GenerationRequest.from_text(question, system=None, raw=False, sampling=sampling)))
    assert isinstance(events[-1], End)
    return text(events)
