"""For each family, a function that reads from ``config.json`` how the model differs from Llama.

A reader gets the config and the number of layers, and returns fields of :class:`ModelConfig`. It reads every key that
its family knows, with the defaults of transformers. A key that it does not read is refused if it may change what the
model computes.
"""

import math
from collections.abc import Sequence
from typing import Any

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.escape import quoted
from rbee_worker.runtime.architecture.config import ExpertsConfig, LayerTraits
from rbee_worker.runtime.architecture.rope import GLOBAL, LOCAL, scaling
from rbee_worker.runtime.formats.quantized.options import quantization_section
from rbee_worker.runtime.untrusted import MAX_COUNT, ConfigReader

Traits = dict[str, Any]
"""Fields of ModelConfig."""


def llama(config: ConfigReader, layers: int) -> Traits:  # noqa: ARG001 (every reader is called the same way)
    """Llama 2 and 3, and models of the same form. Readers of similar families call it too."""
    bias = config.boolean("attention_bias", default=False)
    return {"attention_bias": bias, "output_bias": bias, "mlp_bias": config.boolean("mlp_bias", default=False)}


def mistral(config: ConfigReader, layers: int) -> Traits:
    """Mistral: every layer has the window, if there is one. A config without ``sliding_window`` means 4096."""
    return {"layers": windowed(config, [True] * layers)}


def mixtral(config: ConfigReader, layers: int) -> Traits:
    """Mixtral: Mistral with a mixture of experts in every layer."""
    experts = ExpertsConfig(
        count=config.integer("num_local_experts", 8, most=MAX_COUNT),
        active=config.integer("num_experts_per_tok", 2),
        intermediate_size=config.integer("intermediate_size"),
    )
    return {"layers": windowed(config, [True] * layers, experts=[True] * layers), "experts": checked(config, experts)}


def qwen2(config: ConfigReader, layers: int) -> Traits:
    """Qwen 2 and 2.5: biases on q, k and v; windows, where they are used, from layer ``max_window_layers`` on."""
    return {"attention_bias": True, "layers": _qwen_layers(config, layers)}


def qwen3(config: ConfigReader, layers: int) -> Traits:
    """Qwen 3: a norm on each head's queries and keys."""
    bias = config.boolean("attention_bias", default=False)
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "query_key_norm": "head",
        "layers": _qwen_layers(config, layers),
    }


def qwen3_moe(config: ConfigReader, layers: int) -> Traits:
    """Qwen3-MoE: experts in every ``decoder_sparse_step``-th layer, but not in ``mlp_only_layers``."""
    step = config.integer("decoder_sparse_step", 1)
    dense = config.items("mlp_only_layers") if config.has("mlp_only_layers") else []
    sparse = [index not in dense and (index + 1) % step == 0 for index in range(layers)]
    experts = ExpertsConfig(
        count=_either(config, "num_experts", "num_local_experts"),
        active=config.integer("num_experts_per_tok", 8),
        intermediate_size=config.integer("moe_intermediate_size", 768),
        renormalise=config.boolean("norm_topk_prob", default=False),
    )
    config.has("max_window_layers")  # transformers ignores it for this family
    windows = [config.boolean("use_sliding_window", default=False)] * layers
    bias = config.boolean("attention_bias", default=False)
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "query_key_norm": "head",
        "layers": windowed(config, windows, experts=sparse),
        "experts": checked(config, experts),
    }


def phi3(config: ConfigReader, layers: int) -> Traits:
    """Phi-3 and Phi-4: q, k and v in one tensor, gate and up in another; ``table.py`` names them."""
    return {"layers": windowed(config, [True] * layers)}


def smollm3(config: ConfigReader, layers: int) -> Traits:
    """SmolLM3: every fourth layer has no rotary embedding."""
    interval = config.integer("no_rope_layer_interval", 4)
    if config.has("no_rope_layers"):
        rotated = [bool(value) for value in config.items("no_rope_layers", layers)]
    else:
        rotated = [(index + 1) % interval != 0 for index in range(layers)]
    config.has("max_window_layers")
    used = config.boolean("use_sliding_window", default=False)
    windows = kinds(config, layers, [used and not value for value in rotated])
    return llama(config, layers) | {"layers": windowed(config, [used and window for window in windows], rotated)}


def gemma2(config: ConfigReader, layers: int) -> Traits:
    """Gemma 2: soft caps, windows in every other layer, norms on both sides, scaled embeddings."""
    windows = kinds(config, layers, [index % 2 == 0 for index in range(layers)])
    return _gemma(config) | {
        "layers": windowed(config, windows),
        "attention_softcap": config.optional_number("attn_logit_softcapping"),
    }


def gemma3(config: ConfigReader, layers: int) -> Traits:
    """Gemma 3 for text: layers with windows have their own rotary parameters; norms on queries and keys."""
    pattern = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
    windows = kinds(config, layers, [(index + 1) % pattern != 0 for index in range(layers)])
    kinds_of_rope = config.section("rope_parameters")
    local = kinds_of_rope.section(LOCAL) if kinds_of_rope is not None else None
    size = config.integer("head_dim")
    positions = config.integer("max_position_embeddings")
    theta = config.number("rope_local_base_freq", 10000.0)
    given = local or ConfigReader({}, config.file)
    return _gemma(config) | {
        "query_key_norm": "head",
        "layers": tuple(
            LayerTraits(window=config.integer("sliding_window"), rope="local") if window else LayerTraits()
            for window in windows
        ),
        "local_rope": scaling(given, rotary_dim=size, theta=theta, max_positions=positions),
    }


def olmo2(config: ConfigReader, layers: int) -> Traits:
    """OLMo 2: norms only after attention and MLP; one norm over all queries, and one over all keys."""
    return llama(config, layers) | {"norm_placement": "after", "query_key_norm": "width"}


def granite(config: ConfigReader, layers: int) -> Traits:
    """Granite: Llama with multipliers."""
    return llama(config, layers) | {
        "embedding_multiplier": config.number("embedding_multiplier", 1.0),
        "residual_multiplier": config.number("residual_multiplier", 1.0),
        "attention_scale": config.number("attention_multiplier", 1.0),
        "logit_multiplier": 1 / config.number("logits_scaling", 1.0),
    }


def stablelm(config: ConfigReader, layers: int) -> Traits:  # noqa: ARG001
    """StableLM: layer norms with biases; attention and MLP in sequence, or in parallel after one norm."""
    side_by_side = config.boolean("use_parallel_residual", default=False)
    return {
        "attention_bias": config.boolean("use_qkv_bias", default=False),
        "norm": "layer",
        "norm_bias": True,
        "norm_placement": "shared" if side_by_side else "before",
        "query_key_norm": "listed" if config.boolean("qk_layernorm", default=False) else "none",
    }


def cohere(config: ConfigReader, layers: int) -> Traits:
    """Command-R: attention and MLP in parallel, layer norms without biases, neighboring dimensions rotated together."""
    return llama(config, layers) | {
        "norm": "layer",
        "norm_placement": "shared",
        "query_key_norm": "heads" if config.boolean("use_qk_norm", default=False) else "none",
        "rope_interleaved": True,
        "logit_multiplier": config.number("logit_scale", 1.0),
    }


def cohere2(config: ConfigReader, layers: int) -> Traits:
    """Command-R7B and Command-A: three layers with windows and rotary embedding, then one with neither."""
    pattern = config.integer("sliding_window_pattern", 4)
    windows = kinds(config, layers, [(index + 1) % pattern != 0 for index in range(layers)])
    if config.text("position_embedding_type", "rope_gptj") != "rope_gptj":
        raise ModelUnsupported(f"{config.file}: position_embedding_type is not rope_gptj, which this family has.")
    return cohere(config, layers) | {"layers": windowed(config, windows, rotated=windows)}


def gpt_oss(config: ConfigReader, layers: int) -> Traits:
    """gpt-oss: attention sinks, windows in every other layer, experts with biases and a clamped activation."""
    windows = kinds(config, layers, [index % 2 == 0 for index in range(layers)])
    quantized = quantization_section(config)
    experts = ExpertsConfig(
        count=_either(config, "num_local_experts", "num_experts"),
        active=config.integer("num_experts_per_tok", 4),
        intermediate_size=config.integer("intermediate_size"),
        bias=True,
        clamp=config.number("swiglu_limit", 7.0),
        alpha=config.number("swiglu_alpha", 1.702),
        mxfp4=quantized is not None,
    )
    if quantized is not None and quantized.text("quant_method", "") != "mxfp4":
        raise ModelUnsupported(f"{config.file}: of gpt-oss, mxfp4 and plain checkpoints are read.")
    bias = config.boolean("attention_bias", default=True)
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "attention_sinks": True,
        "layers": windowed(config, windows, experts=[True] * layers),
        "experts": checked(config, experts),
    }


def kinds(config: ConfigReader, layers: int, default: Sequence[bool]) -> list[bool]:
    """For each layer, whether it has a window: from ``layer_types``, or ``default`` where the config lacks it.

    Raises:
        ModelUnsupported: ``layer_types`` names a kind of layer that is not known.
        ModelMalformed: ``layer_types`` is not a list with one entry for each layer.
    """
    if not config.has("layer_types"):
        return list(default)
    names = config.items("layer_types", layers)
    for name in names:
        if name not in (GLOBAL, LOCAL):
            raise ModelUnsupported(f"{config.file}: layer_types names {quoted(name)}; {GLOBAL} and {LOCAL} are known.")
    return [name == LOCAL for name in names]


def windowed(
    config: ConfigReader,
    windows: Sequence[bool],
    rotated: Sequence[bool] | None = None,
    experts: Sequence[bool] | None = None,
) -> tuple[LayerTraits, ...]:
    """Make the layers.

    Args:
        config: its ``sliding_window`` is the window; where it is null, no layer has one.
        windows: for each layer, whether it has the window.
        rotated: for each layer, whether it has rotary embedding; None: all have.
        experts: for each layer, whether its MLP is a mixture of experts; None: none is.
    """
    window = config.optional_integer("sliding_window")
    return tuple(
        LayerTraits(
            window=window if has_window else None,
            rope="global" if rotated is None or rotated[index] else "none",
            experts=experts is not None and experts[index],
        )
        for index, has_window in enumerate(windows)
    )


def checked(config: ConfigReader, experts: ExpertsConfig) -> ExpertsConfig:
    """``experts``, if there are as many as a token goes through.

    Raises:
        ModelMalformed: there are fewer.
    """
    if experts.active > experts.count:
        raise ModelMalformed(f"{config.file}: {experts.active} experts a token, of {experts.count}.")
    return experts


def _either(config: ConfigReader, name: str, other: str) -> int:
    """The number of experts, under key ``name`` or, without that, ``other``."""
    count = config.integer(other, 128, most=MAX_COUNT)
    return config.integer(name, count, most=MAX_COUNT)


def _qwen_layers(config: ConfigReader, layers: int) -> tuple[LayerTraits, ...]:
    used = config.boolean("use_sliding_window", default=False)
    first = config.integer("max_window_layers", 28) if config.values.get("max_window_layers") != 0 else 0
    config.has("max_window_layers")
    windows = kinds(config, layers, [used and index >= first for index in range(layers)])
    return windowed(config, [used and window for window in windows])


def _gemma(config: ConfigReader) -> Traits:
    """What Gemma 2 and 3 share."""
    config.has("hidden_act")  # older files have both; hidden_activation is the one that counts
    bias = config.boolean("attention_bias", default=False)
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "norm": "rms-offset",
        "norm_placement": "both",
        "attention_scale": config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "final_softcap": config.optional_number("final_logit_softcapping"),
        "embedding_multiplier": math.sqrt(config.integer("hidden_size")),
    }
