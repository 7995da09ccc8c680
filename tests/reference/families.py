"""The families and rotary scalings that are proven, as tiny configs of transformers.

``python -m tests.reference.families`` writes their table into ``docs/models.md``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from rbee_worker.runtime.architecture.config import ROPE_KINDS
from rbee_worker.runtime.architecture.table import ARCHITECTURES
from rbee_worker.runtime.formats.gguf.families import ARCHITECTURES as GGUF_ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN = "<!-- proven: written by python -m tests.reference.families -->"
END = "<!-- end of what is proven -->"

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A tiny config.

    Attributes:
        family: prefix of transformers' classes.
        changes: to SIZES.
        shortest, longest: tokens of the prompts that are tried.
        context: to serve; None: the model's own.
        generates: whether greedy tokens are compared too.
        crossing: length of the prompt from which greedy tokens are compared; None: the last one's.
        offset_norms: norm weights are stored as differences from one.
    """

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    shortest: int = 1
    longest: int = 128
    context: int | None = None
    generates: bool = True
    crossing: int | None = None
    offset_norms: bool = False
    config_class: str = ""

    @property
    def architecture(self) -> str:
        return f"{self.family}ForCausalLM"

    def config(self, **values: Any) -> PreTrainedConfig:
        return getattr(transformers, self.config_class or f"{self.family}Config")(**values)

    def build(self) -> PreTrainedModel:
        return getattr(transformers, self.architecture)(self.config(**(SIZES | self.changes)))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 5.0, 9.0],
}


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **values}}


CASES: dict[str, Case] = {
    "Llama": Case("Llama"),
    "Llama, linear": Case("Llama", rope(rope_type="linear", factor=4.0)),
    "Llama, dynamic": Case("Llama", rope(rope_type="dynamic", factor=4.0)),
    "Llama, dynamic, stretched": Case(
        "Llama",
        rope(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": 32},
        48,
        48,
        context=48,
        generates=False,
    ),
    "Llama, llama3": Case("Llama", rope(**LLAMA3)),
    "Llama, yarn": Case("Llama", rope(**YARN)),
    "Llama, yarn with mscale": Case("Llama", rope(**YARN, mscale=0.7, mscale_all_dim=1.2, truncate=False, beta_fast=8)),
    "Llama, yarn with attention factor": Case("Llama", rope(**YARN, attention_factor=0.9, beta_slow=2)),
    "Mistral": Case("Mistral", {"sliding_window": 7, "head_dim": 12}),
    "Mistral, no window": Case("Mistral", {"sliding_window": None}),
    "Qwen2": Case("Qwen2"),
    "Qwen2, windows": Case("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "Qwen3": Case("Qwen3", {"head_dim": 16}),
    "Qwen3, windows": Case(
        "Qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "attention_bias": True,
        },
    ),
    "Phi3": Case("Phi3", {"partial_rotary_factor": 0.5}),
    "Phi3, window": Case("Phi3", {"sliding_window": 11}),
    "Phi3, longrope": Case("Phi3", rope(**LONG) | {"original_max_position_embeddings": 20, "head_dim": 8}),
    "Phi3, longrope, short context": Case(
        "Phi3", rope(**LONG) | {"original_max_position_embeddings": 64, "head_dim": 8}, longest=64, context=64
    ),
    "Phi3, longrope, crossed": Case(
        "Phi3", rope(**LONG) | {"original_max_position_embeddings": 30, "head_dim": 8}, longest=90, crossing=17
    ),
    "SmolLM3": Case("SmolLM3"),
    "SmolLM3, windows": Case(
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 2, "attention_bias": True},
    ),
    "Granite": Case(
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
            "mlp_bias": True,
        },
    ),
    "Gemma2": Case(
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
        offset_norms=True,
    ),
    "Gemma2, tied, no caps": Case(
        "Gemma2",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 4,
        },
        offset_norms=True,
    ),
    "Gemma3": Case(
        "Gemma3",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 12,
            "sliding_window_pattern": 3,
            "tie_word_embeddings": True,
        },
        offset_norms=True,
        config_class="Gemma3TextConfig",
    ),
    "Gemma3, linear": Case(
        "Gemma3",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        offset_norms=True,
        config_class="Gemma3TextConfig",
    ),
    "Olmo2": Case("Olmo2"),
    "Olmo2, all heads": Case("Olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
    "StableLm": Case("StableLm"),
    "StableLm, side by side": Case(
        "StableLm",
        {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    ),
    "Cohere": Case("Cohere", {"logit_scale": 0.3, "tie_word_embeddings": True}),
    "Cohere, normed": Case("Cohere", {"use_qk_norm": True, "attention_bias": True}),
    "Cohere2": Case("Cohere2", {"sliding_window": 6, "layer_types": None, "tie_word_embeddings": True}),
    "Mixtral": Case("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "Mixtral, window": Case("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 8}),
    "Qwen3Moe": Case(
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "head_dim": 8,
        },
    ),
    "Qwen3Moe, some dense": Case(
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 9,
            "head_dim": 8,
        },
    ),
    "GptOss": Case(
        "GptOss",
        {
            "head_dim": 8,
            "intermediate_size": 32,
            "sliding_window": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.5,
            "rope_parameters": {**YARN, "rope_theta": 1000.0, "truncate": False},
        },
    ),
    "GptOss, plain rope": Case(
        "GptOss",
        {
            "head_dim": 8,
            "sliding_window": 40,
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
}
"""Name -> what it is."""


def insert_table(page: str) -> str:
    """The page with what is between the marks replaced by today's table."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks one of its marks: {BEGIN} … {END}")
    return f"{head}{BEGIN}\n\n{table()}\n{END}{tail}"


def table() -> str:
    """Markdown: a row for each family, and one for each rotary scaling."""
    rows = [
        ("family", "architecture", "logits", "greedy", "16 bits, int8", "GGUF", "and with"),
        ("---",) * 7,
        *(_row(name) for name in ARCHITECTURES),
    ]
    ropes = [("rotary scaling", "proven with"), ("---", "---"), *((f"`{kind}`", _cases(kind)) for kind in ROPE_KINDS)]
    return "\n\n".join("\n".join(f"| {' | '.join(cells)} |" for cells in part) for part in (rows, ropes)) + "\n"


def _row(architecture: str) -> tuple[str, ...]:
    names = [name for name, case in CASES.items() if case.architecture == architecture]
    if not names:
        raise ValueError(f"{architecture} has no case")
    greedy = any(CASES[name].generates for name in names)
    variants = [name.partition(", ")[2] for name in names if ", " in name]
    family = ARCHITECTURES[architecture].family
    formats = [f"`{name}`" for name, known in GGUF_ARCHITECTURES.items() if known.name == architecture]
    return family, f"`{architecture}`", "✓", "✓" if greedy else "", "✓", ", ".join(formats), "; ".join(variants)


def _cases(kind: str) -> str:
    if kind == "default":
        return "all others"
    return "; ".join(name for name, case in CASES.items() if kind in _kinds(case))


def _kinds(case: Case) -> Iterator[str]:
    given = case.changes.get("rope_parameters", {})
    for parameters in (given, *(value for value in given.values() if isinstance(value, dict))):
        yield parameters.get("rope_type", "default")


if __name__ == "__main__":
    PAGE.write_text(insert_table(PAGE.read_text("utf-8")), "utf-8")
