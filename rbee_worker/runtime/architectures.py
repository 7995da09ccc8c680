"""The table of model families: what each calls its weights.

A Llama-like family is one more entry in :data:`ARCHITECTURES`; the decoder in ``transformer.py`` asks for weights
by role (``q``, ``gate``, ``mlp_norm``), and the entry says which tensor that is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rbee_worker.runtime.model_config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Tensor names of a family.

    Attributes:
        embedding, norm, head: names of the tensors outside the layers.
        layer_prefix: name of layer ``{}``, with its trailing dot.
        layer: role -> name inside a layer, without ``.weight`` or ``.bias``.
        ignored_suffixes: tensors that some checkpoints carry and nothing needs.
    """

    embedding: str
    norm: str
    head: str
    layer_prefix: str
    layer: Mapping[str, str]
    ignored_suffixes: tuple[str, ...] = ()


LLAMA = Architecture(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    layer_prefix="model.layers.{}.",
    layer={
        "attention_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    # Rotary frequencies that old exports stored; they are computed from the config.
    ignored_suffixes=(".rotary_emb.inv_freq",),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
}


def supported() -> tuple[str, ...]:
    """Names of the architectures this worker runs, as ``config.json`` spells them."""
    return tuple(ARCHITECTURES)


def layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Role (with ``.weight`` or ``.bias``) -> shape of every tensor in one decoder layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "attention_norm.weight": (hidden,),
        "q.weight": (q_size, hidden),
        "k.weight": (kv_size, hidden),
        "v.weight": (kv_size, hidden),
        "o.weight": (hidden, q_size),
        "mlp_norm.weight": (hidden,),
        "gate.weight": (inner, hidden),
        "up.weight": (inner, hidden),
        "down.weight": (hidden, inner),
    }
    biased = [*("qkvo" if config.attention_bias else ""), *(("gate", "up", "down") if config.mlp_bias else ())]
    shapes.update({f"{role}.bias": shapes[f"{role}.weight"][:1] for role in biased})
    return shapes
