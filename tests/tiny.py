"""A random Llama of a few kilobytes, written without transformers, for tests that need a model but not its wits."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def byte_tokenizer() -> Tokenizer:
    """One token per byte, ids 0 to 255."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random float32 weights under their Hugging Face names."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv_size = hidden // heads * config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "lm_head": (config["vocab_size"], hidden)}
    norms = ["model.norm"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norms += [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"]
        shapes |= {
            f"{prefix}.self_attn.q_proj": (hidden, hidden),
            f"{prefix}.self_attn.k_proj": (kv_size, hidden),
            f"{prefix}.self_attn.v_proj": (kv_size, hidden),
            f"{prefix}.self_attn.o_proj": (hidden, hidden),
            f"{prefix}.mlp.gate_proj": (inner, hidden),
            f"{prefix}.mlp.up_proj": (inner, hidden),
            f"{prefix}.mlp.down_proj": (hidden, inner),
        }
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": torch.ones(hidden) for name in norms}
    return tensors


END = "<|im_end|>"
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call: <tool_call>
{"name": "f", "arguments": {}}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}"""
"""In the manner of Qwen3: reasoning that can be left out, tool calls like Hermes."""


def write_tiny_model(path: Path, *, chat_template: str | None = None, **changes: Any) -> Path:
    """Write a model folder; ``changes`` go into its config.

    With a chat template it has one token more, ``<|im_end|>``, with which its texts end.
    """
    tokenizer = byte_tokenizer()
    if chat_template is not None:
        tokenizer.add_special_tokens([END])
        changes = {"eos_token_id": tokenizer.token_to_id(END), "vocab_size": tokenizer.get_vocab_size()} | changes
    config = CONFIG | changes
    path.mkdir(parents=True, exist_ok=True)
    tensors = weights(config)
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(path / "tokenizer.json"))
    if chat_template is not None:
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))
    return path


def damage_normalizer(path: Path, *, in_use: bool = False) -> Path:
    """Give a model's tokenizer.json rules over which the tokenizers library panics: when it reads them, or in use."""
    # In use: a table of one unit that points far behind its end. Else: too short for the length of a table.
    rules = "BAAAAP////8=" if in_use else "AAAA"
    file = path / "tokenizer.json"
    content = json.loads(file.read_text()) | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": rules}}
    file.write_text(json.dumps(content))
    return path


def panic(*_: object, **__: object) -> Any:
    """Panic in the tokenizers library: raises its ``PanicException``, which is no Exception."""
    normalizers.Precompiled(base64.b64decode("BAAAAP////8=")).normalize_str("a")
