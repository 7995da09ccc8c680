"""The table of model families: the names of their weights, and how their ``config.json`` is read.

Each Llama-like family is an entry in :data:`ARCHITECTURES`. The decoder in ``model/decoder.py`` asks for weights by
role (``q``, ``gate``, ``mlp_norm``), and the entry says which tensor that is. docs/adding-a-model.md shows how to add
a family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.escape import one_line, quoted
from rbee_worker.runtime.architecture import readers
from rbee_worker.runtime.architecture.config import Activation, LayerTraits, ModelConfig
from rbee_worker.runtime.architecture.rope import read_rope, rotary_size
from rbee_worker.runtime.formats.quantized.options import quantization_section
from rbee_worker.runtime.untrusted import MAX_COUNT, MAX_DIMENSION, ConfigReader

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_new": "gelu-tanh",
}

ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
LLAMA_LAYER = NORMS | ATTENTION | MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One family.

    Attributes:
        family: its name, for people.
        layer: role -> name of the tensor inside a layer, without ``.weight`` or ``.bias``. ``{}`` stands for a number.
        traits: reads how a model differs from Llama; see ``readers.py``.
        defaults: values of absent config keys, where transformers' defaults are not Llama's.
        norm_eps, activation: the names of the config keys that hold these.
        partial_rotary: whether the family uses ``partial_rotary_factor``.
        embedding, norm, head: names of the tensors outside the layers.
        layer_prefix: what the names of a layer's tensors begin with; ``{}`` stands for its number.
        ignored_suffixes: endings of the names of tensors that some checkpoints have and that are not needed.
    """

    family: str
    layer: Mapping[str, str] = field(default_factory=lambda: LLAMA_LAYER)
    traits: Callable[[ConfigReader, int], readers.Traits] = readers.llama
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm_eps: str = "rms_norm_eps"
    activation: str = "hidden_act"
    partial_rotary: bool = False
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm"
    head: str = "lm_head.weight"
    layer_prefix: str = "model.layers.{}."
    # Older checkpoints store rotary frequencies. Here they are computed from the config.
    ignored_suffixes: tuple[str, ...] = (".rotary_emb.inv_freq",)


LLAMA = Architecture(family="Llama")
_GEMMA_LAYER = (
    ATTENTION
    | MLP
    | {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
)
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_COHERE_DEFAULTS = {"logit_scale": 0.0625, "tie_word_embeddings": True, "layer_norm_eps": 1e-5}

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": Architecture(
        family="Mistral",
        traits=readers.mistral,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "Qwen2ForCausalLM": Architecture(
        family="Qwen 2",
        traits=readers.qwen2,
        defaults={"sliding_window": 4096, "max_position_embeddings": 32768},
    ),
    "Qwen3ForCausalLM": Architecture(
        family="Qwen 3",
        layer=LLAMA_LAYER | HEAD_NORMS,
        traits=readers.qwen3,
        defaults={"head_dim": 128, "sliding_window": 4096, "max_position_embeddings": 32768},
    ),
    "Phi3ForCausalLM": Architecture(
        family="Phi-3",
        layer=NORMS
        | {
            "qkv": "self_attn.qkv_proj",
            "o": "self_attn.o_proj",
            "gate_up": "mlp.gate_up_proj",
            "down": "mlp.down_proj",
        },
        traits=readers.phi3,
        partial_rotary=True,
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    ),
    "SmolLM3ForCausalLM": Architecture(
        family="SmolLM3",
        traits=readers.smollm3,
        defaults={
            "rope_theta": 2e6,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "GraniteForCausalLM": Architecture(family="Granite", traits=readers.granite),
    "Gemma2ForCausalLM": Architecture(
        family="Gemma 2",
        layer=_GEMMA_LAYER,
        traits=readers.gemma2,
        activation="hidden_activation",
        defaults=_GEMMA_DEFAULTS
        | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "Gemma3ForCausalLM": Architecture(
        family="Gemma 3",
        layer=_GEMMA_LAYER | HEAD_NORMS,
        traits=readers.gemma3,
        activation="hidden_activation",
        defaults=_GEMMA_DEFAULTS | {"max_position_embeddings": 131072, "rope_theta": 1e6},
    ),
    "Olmo2ForCausalLM": Architecture(
        family="OLMo 2",
        layer=ATTENTION
        | MLP
        | HEAD_NORMS
        | {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
        traits=readers.olmo2,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "StableLmForCausalLM": Architecture(
        family="StableLM",
        layer=LLAMA_LAYER
        | {"q_norm.{}": "self_attn.q_layernorm.norms.{}", "k_norm.{}": "self_attn.k_layernorm.norms.{}"},
        traits=readers.stablelm,
        norm_eps="layer_norm_eps",
        partial_rotary=True,
        defaults={"layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25},
    ),
    "CohereForCausalLM": Architecture(
        family="Command-R",
        layer=LLAMA_LAYER | HEAD_NORMS,
        traits=readers.cohere,
        norm_eps="layer_norm_eps",
        defaults=_COHERE_DEFAULTS | {"max_position_embeddings": 8192, "rope_theta": 500000.0},
    ),
    "Cohere2ForCausalLM": Architecture(
        family="Command-R7B",
        traits=readers.cohere2,
        norm_eps="layer_norm_eps",
        defaults=_COHERE_DEFAULTS | {"max_position_embeddings": 8192, "sliding_window": 4096},
    ),
    "MixtralForCausalLM": Architecture(
        family="Mixtral",
        layer=NORMS
        | ATTENTION
        | {
            "router": "block_sparse_moe.gate",
            "experts.{}.gate": "block_sparse_moe.experts.{}.w1",
            "experts.{}.up": "block_sparse_moe.experts.{}.w3",
            "experts.{}.down": "block_sparse_moe.experts.{}.w2",
        },
        traits=readers.mixtral,
        defaults={
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "Qwen3MoeForCausalLM": Architecture(
        family="Qwen3-MoE",
        layer=LLAMA_LAYER
        | HEAD_NORMS
        | {
            "router": "mlp.gate",
            "experts.{}.gate": "mlp.experts.{}.gate_proj",
            "experts.{}.up": "mlp.experts.{}.up_proj",
            "experts.{}.down": "mlp.experts.{}.down_proj",
        },
        traits=readers.qwen3_moe,
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "GptOssForCausalLM": Architecture(
        family="gpt-oss",
        layer=NORMS
        | ATTENTION
        | {"sinks": "self_attn.sinks", "router": "mlp.router"}
        | {
            f"experts.{matrix}{part}": f"mlp.experts.{matrix}_proj{part}"
            for matrix in ("gate_up", "down")
            for part in ("", "_blocks", "_scales", "_bias")
        },
        traits=readers.gpt_oss,
        defaults={
            "head_dim": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
        },
    ),
}


def supported() -> tuple[str, ...]:
    """Names of the supported architectures, as they stand in ``architectures`` of ``config.json``."""
    return tuple(ARCHITECTURES)


def parse_config(config: Mapping[str, Any], *, file: str) -> ModelConfig:
    """Read ``config.json``.

    Args:
        config: the parsed file.
        file: its name, for messages.

    Raises:
        ModelUnsupported: another architecture, or a key that is not handled and may change what the model computes.
        ModelMalformed: a key is missing, of the wrong type, or inconsistent with another.
    """
    name = _architecture_name(config, file)
    architecture = ARCHITECTURES[name]
    reader = ConfigReader({**architecture.defaults, **config}, file)
    layers, heads = reader.integer("num_hidden_layers", most=MAX_COUNT), reader.integer("num_attention_heads")
    head_dim, kv_heads = _heads(reader, heads)
    positions = reader.integer("max_position_embeddings", 2048)
    values: dict[str, Any] = {
        "architecture": name,
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": reader.integer("hidden_size"),
        "intermediate_size": reader.integer("intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "norm_eps": reader.number(architecture.norm_eps, 1e-6),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", default=False),
        "activation": _activation(reader, architecture.activation),
        "layers": (LayerTraits(),) * layers,
    }
    values |= architecture.traits(reader, layers)
    quantization_section(reader)  # marks the key as read; ``formats/quantized`` uses its content
    local = "local_rope" in values
    size = rotary_size(reader, head_dim, partial=architecture.partial_rotary, local=local)
    values["rotary_dim"] = size
    values["rope"] = read_rope(reader, rotary_dim=size, theta=10000.0, max_positions=positions, local=local)
    reader.refuse_unread(architecture.family)
    model = ModelConfig(**values)
    if model.longest_context > MAX_DIMENSION:
        raise ModelMalformed(
            f"{file}: rotary scaling by {model.rope.factor:g} makes a context of {model.longest_context:g} tokens; "
            f"{MAX_DIMENSION} are allowed."
        )
    return model


def _architecture_name(config: Mapping[str, Any], file: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelMalformed(f"{file}: 'architectures' names no model class.")
    name: str = names[0]
    if name not in ARCHITECTURES:
        raise ModelUnsupported(
            f"{file}: architecture {one_line(name)} is not supported.", hint=f"Supported: {', '.join(supported())}."
        )
    return name


def _heads(reader: ConfigReader, heads: int) -> tuple[int, int]:
    """The size of a head, and the number of heads of keys and values."""
    hidden, kv_heads = reader.integer("hidden_size"), reader.integer("num_key_value_heads", heads)
    if not reader.has("head_dim") and hidden % heads:
        raise ModelMalformed(f"{reader.file}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    head_dim = reader.integer("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelMalformed(
            f"{reader.file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
        )
    if head_dim % 2:
        raise ModelMalformed(f"{reader.file}: head_dim {head_dim} is odd; rotary embedding needs an even one.")
    return head_dim, kv_heads


def _activation(reader: ConfigReader, key: str) -> Activation:
    name = reader.text(key, "silu")
    if name not in _ACTIVATIONS:
        raise ModelUnsupported(
            f"{reader.file}: {key} {quoted(name)} is not supported.", hint=f"Supported: {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]
