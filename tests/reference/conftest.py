"""Tiny random models saved by transformers, and both implementations side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rbee_worker.config import EngineConfig
from rbee_worker.runtime.engine.engine import Engine
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


def load(path: Path, dtype: str = "float32", **config: Any) -> Engine:
    """The worker's engine with a model in it."""
    engine = Engine(EngineConfig(device="cpu", dtype=dtype, **config))
    for _ in engine.load(str(path)):
        pass
    return engine
