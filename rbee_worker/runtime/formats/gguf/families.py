"""The families that are read from GGUF files: for each, how ggml's names map to Hugging Face's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one value of ``general.architecture`` maps to Hugging Face.

    Attributes:
        name: the value of ``architectures`` in config.json.
        model_type: the value of ``model_type`` in config.json.
        block: ggml's name of a tensor inside a block -> its Hugging Face name, both without prefix and suffix.
        experts: ggml's name of a tensor that holds all experts of a block -> Hugging Face's name of one of them, with
            ``{}`` for its number. Empty: the family has no mixture of experts.
        outer: ggml's full name of a tensor outside the blocks -> its full Hugging Face name.
        interleaved_rope: tensors of a block whose rows are permuted per head -> the metadata key of the head count.
        biases: whether config.json says which matrices have biases.
        norm_shift: added to norm weights. llama.cpp stores Gemma's weight plus 1; Hugging Face stores it without the 1.
        constants: config keys with a value that is the same for all models of the family.
        numbers: metadata key, without prefix -> key of config.json. 0 in the metadata stands for null.
        scale_of_heads: how many layers the one model has whose attention is scaled by ``hidden_size / heads``; in all
            others it is scaled by ``head_dim``. 0: the family has no ``query_pre_attn_scalar``.
        partial_rotary: whether only some dimensions of a head may be rotated.
    """

    name: str
    model_type: str
    block: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    interleaved_rope: Mapping[str, str] = field(default_factory=dict)
    biases: bool = False
    norm_shift: float = 0.0
    constants: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    numbers: Mapping[str, str] = field(default_factory=dict)
    scale_of_heads: int = 0
    partial_rotary: bool = False


_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_BLOCK = _LLAMA_BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
"""LongRoPE's factors are tensors in GGUF: config key -> name of the tensor."""

_GEMMA_ACTIVATION = {"hidden_activation": "gelu_pytorch_tanh"}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(
            name="LlamaForCausalLM",
            model_type="llama",
            block=_LLAMA_BLOCK,
            interleaved_rope={"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"},
            biases=True,
        ),
        "qwen2": Architecture(name="Qwen2ForCausalLM", model_type="qwen2", block=_LLAMA_BLOCK),
        "qwen3": Architecture(name="Qwen3ForCausalLM", model_type="qwen3", block=_LLAMA_BLOCK | _HEAD_NORMS),
        "qwen3moe": Architecture(
            name="Qwen3MoeForCausalLM",
            model_type="qwen3_moe",
            block=_LLAMA_BLOCK | _HEAD_NORMS | {"ffn_gate_inp": "mlp.gate"},
            experts={f"ffn_{role}_exps": f"mlp.experts.{{}}.{role}_proj" for role in ("gate", "up", "down")},
            constants={"hidden_act": "silu", "norm_topk_prob": True},
            numbers={
                "expert_count": "num_experts",
                "expert_used_count": "num_experts_per_tok",
                "expert_feed_forward_length": "moe_intermediate_size",
            },
        ),
        "phi3": Architecture(
            name="Phi3ForCausalLM",
            model_type="phi3",
            block={
                "attn_norm": "input_layernorm",
                "attn_qkv": "self_attn.qkv_proj",
                "attn_output": "self_attn.o_proj",
                "ffn_norm": "post_attention_layernorm",
                "ffn_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
            },
            numbers={
                "attention.sliding_window": "sliding_window",
                "rope.scaling.original_context_length": "original_max_position_embeddings",
            },
            partial_rotary=True,
        ),
        "gemma2": Architecture(
            name="Gemma2ForCausalLM",
            model_type="gemma2",
            block=_GEMMA_BLOCK,
            norm_shift=-1.0,
            constants=_GEMMA_ACTIVATION,
            numbers={
                "attention.sliding_window": "sliding_window",
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            scale_of_heads=46,
        ),
        "gemma3": Architecture(
            name="Gemma3ForCausalLM",
            model_type="gemma3_text",
            block=_GEMMA_BLOCK | _HEAD_NORMS,
            norm_shift=-1.0,
            constants=_GEMMA_ACTIVATION | {"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
            numbers={
                "attention.sliding_window": "sliding_window",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            scale_of_heads=62,
        ),
    }
)
"""Key: the value of ``general.architecture``."""
