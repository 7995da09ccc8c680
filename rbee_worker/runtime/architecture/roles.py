"""The tensors of a layer by role: their shapes, their names, and how many weights they have.

A role is a path such as ``q.weight``, ``attention_norm.bias`` or ``experts.7.down.weight``.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping

from rbee_worker.runtime.architecture.config import ExpertsConfig, ModelConfig
from rbee_worker.runtime.architecture.table import ARCHITECTURES, Architecture

Shape = tuple[int, ...]

_BLOCK = 32
"""Values of an MXFP4 tensor that share an exponent. A byte holds two values."""

LINEAR = frozenset({"qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down"})
"""Roles of the matrices of linear layers. They are kept in memory in one of the forms of ``model/linear/linear.py``."""

TABLES = frozenset({"embedding", "head"})
"""Roles of the matrices that have a row for each token."""

STACKED = frozenset(f"experts.{role}{form}" for role in ("gate_up", "down") for form in ("", "_blocks"))
"""Roles of tensors that hold the matrices of all experts of a layer."""

_NORMS: Mapping[str, tuple[str, ...]] = {
    "before": ("attention_norm", "mlp_norm"),
    "after": ("attention_post_norm", "mlp_post_norm"),
    "both": ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"),
    "shared": ("attention_norm",),
}


def of_linear(role: str) -> bool:
    """Whether a role is a matrix or bias of a linear layer. Other roles (norms, routers, sinks) are kept as stored."""
    return role.startswith("experts.") or role.rpartition(".")[0].rpartition(".")[2] in LINEAR


def is_matrix(role: str) -> bool:
    """Whether a role is the matrix of a linear layer."""
    return role.endswith(".weight") and of_linear(role)


def tensor_name(architecture: Architecture, index: int, role: str) -> str:
    """The name, in the checkpoint, of the tensor with this role in layer ``index``."""
    stem, dot, suffix = role.rpartition(".")
    if suffix not in {"weight", "bias"}:
        stem, dot, suffix = role, "", ""
    number = re.search(r"\.(\d+)", stem)
    name = architecture.layer[re.sub(r"\.\d+", ".{}", stem)]
    return f"{architecture.layer_prefix.format(index)}{name.format(number[1]) if number else name}{dot}{suffix}"


def layer_shapes(config: ModelConfig, index: int = 0) -> dict[str, Shape]:
    """Role -> shape of every tensor in layer ``index``. Each expert's matrices have roles of their own."""
    shapes: dict[str, Shape] = {}
    for role in _NORMS[config.norm_placement]:
        shapes[f"{role}.weight"] = (config.hidden_size,)
        if config.norm_bias:
            shapes[f"{role}.bias"] = (config.hidden_size,)
    shapes |= _attention(config)
    experts = config.experts if config.layers[index].experts else None
    if experts is None:
        return shapes | _mlp(config, config.intermediate_size, "", bias=config.mlp_bias)
    shapes["router.weight"] = (experts.count, config.hidden_size)
    if experts.bias:
        shapes["router.bias"] = (experts.count,)
    return shapes | _experts(config, experts)


def stored_shapes(config: ModelConfig, index: int) -> dict[str, Shape]:
    """As :func:`layer_shapes`, but for the tensors of the checkpoint: one tensor may hold all experts of the layer."""
    shapes = layer_shapes(config, index)
    experts = config.experts if config.layers[index].experts else None
    if experts is None or "experts.gate_up" not in ARCHITECTURES[config.architecture].layer:
        return shapes
    others = {role: shape for role, shape in shapes.items() if not role.startswith("experts.")}
    return others | _stacked_shapes(experts, config.hidden_size)


def kinds_of_layers(config: ModelConfig) -> list[tuple[int, int]]:
    """For each kind of layer: the index of the first layer of that kind, and how many layers are of it."""
    return [(config.layers.index(kind), count) for kind, count in Counter(config.layers).items()]


def parameters(config: ModelConfig, *, active: bool = False) -> int:
    """How many weights the model has; tied ones count once. ``active``: only those that one token goes through."""
    tables = 1 if config.tie_word_embeddings else 2
    total = tables * config.vocab_size * config.hidden_size + config.hidden_size * (1 + config.norm_bias)
    for index, count in kinds_of_layers(config):
        own, of_experts = 0, 0
        for role, shape in layer_shapes(config, index).items():
            if role.startswith("experts."):
                of_experts += math.prod(shape)
            else:
                own += math.prod(shape)
        if active and config.experts is not None:
            of_experts = of_experts * config.experts.active // config.experts.count
        total += count * (own + of_experts)
    return total


def _attention(config: ModelConfig) -> dict[str, Shape]:
    hidden = config.hidden_size
    q_size, kv_size = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, Shape] = {}
    fused = "qkv" in ARCHITECTURES[config.architecture].layer
    rows = {"qkv": q_size + 2 * kv_size} if fused else {"q": q_size, "k": kv_size, "v": kv_size}
    for role, size in rows.items():
        shapes[f"{role}.weight"] = (size, hidden)
        if config.attention_bias:
            shapes[f"{role}.bias"] = (size,)
    shapes["o.weight"] = (hidden, q_size)
    if config.output_bias:
        shapes["o.bias"] = (hidden,)
    for role, heads in (("q_norm", config.num_attention_heads), ("k_norm", config.num_key_value_heads)):
        shapes |= _head_norm(config, role, heads)
    if config.attention_sinks:
        shapes["sinks"] = (config.num_attention_heads,)
    return shapes


def _head_norm(config: ModelConfig, role: str, heads: int) -> dict[str, Shape]:
    if config.query_key_norm == "none":
        return {}
    if config.query_key_norm == "listed":
        return {f"{role}.{head}.weight": (config.head_dim,) for head in range(heads)}
    shapes: dict[str, Shape] = {
        "head": (config.head_dim,),
        "heads": (heads, config.head_dim),
        "width": (heads * config.head_dim,),
    }
    return {f"{role}.weight": shapes[config.query_key_norm]}


def _mlp(config: ModelConfig, inner: int, prefix: str, *, bias: bool) -> dict[str, Shape]:
    fused = "gate_up" in ARCHITECTURES[config.architecture].layer
    rows = {"gate_up": 2 * inner} if fused else {"gate": inner, "up": inner}
    shapes: dict[str, Shape] = {f"{prefix}{role}.weight": (size, config.hidden_size) for role, size in rows.items()}
    shapes[f"{prefix}down.weight"] = (config.hidden_size, inner)
    if bias:
        shapes |= {role.replace("weight", "bias"): shape[:1] for role, shape in shapes.items()}
    return shapes


def _experts(config: ModelConfig, experts: ExpertsConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for number in range(experts.count):
        shapes |= _mlp(config, experts.intermediate_size, f"experts.{number}.", bias=experts.bias)
    return shapes


def _stacked_shapes(config: ExpertsConfig, hidden_size: int) -> dict[str, Shape]:
    """Role -> shape of the stored tensors that each hold all experts of a layer."""
    count, inner = config.count, config.intermediate_size
    shapes: dict[str, Shape] = {}
    for role, outputs, inputs in (("gate_up", 2 * inner, hidden_size), ("down", hidden_size, inner)):
        if config.mxfp4:
            shapes[f"experts.{role}_blocks"] = (count, outputs, inputs // _BLOCK, _BLOCK // 2)
            shapes[f"experts.{role}_scales"] = (count, outputs, inputs // _BLOCK)
        else:
            shapes[f"experts.{role}"] = (count, inputs, outputs)
        shapes[f"experts.{role}_bias"] = (count, outputs)
    return shapes
