"""ModelConfig: what the decoder needs to know about a model. ``table.py`` reads it from a ``config.json``."""

from dataclasses import dataclass
from typing import Literal

from rbee_worker.errors import InvalidRequest, Remedy

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

NormKind = Literal["rms", "rms-offset", "layer"]
NormPlacement = Literal["before", "after", "both", "shared"]
QueryKeyNorm = Literal["none", "head", "heads", "listed", "width"]
Activation = Literal["silu", "gelu", "gelu-tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Rotary embedding parameters (config keys ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``).

    Attributes:
        kind: how positions or frequencies are scaled; ``model/rope.py`` has the formulas.
        theta: base of the frequencies.
        factor, low_freq_factor, high_freq_factor, beta_fast, beta_slow, truncate, short_factor, long_factor: the config
            keys of the same names.
        original_max_positions: the context before scaling, in tokens.
        attention_factor: cosines and sines are multiplied by it.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTraits:
    """What may differ from layer to layer.

    Attributes:
        window: how many positions a query sees, its own included; None: all positions up to its own.
        rope: which rotary embedding: ``rope`` of the model, its ``local_rope`` (Gemma 3), or none (SmolLM3).
        experts: whether the MLP is a mixture of experts.
    """

    window: int | None = None
    rope: Literal["global", "local", "none"] = "global"
    experts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts.

    Attributes:
        count: experts in a layer.
        active: how many experts each token goes through.
        intermediate_size: of one expert.
        renormalise: whether the weights of a token's experts are scaled to sum to one.
        bias: whether the router and the experts' matrices have biases.
        clamp: gpt-oss's limit on gate and up (``swiglu_limit``); None: the plain gated activation.
        alpha: of the clamped activation (``swiglu_alpha``).
        mxfp4: whether the experts are stored in MXFP4.
    """

    count: int
    active: int
    intermediate_size: int
    renormalise: bool = True
    bias: bool = False
    clamp: float | None = None
    alpha: float = 1.702
    mxfp4: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of a decoder. The defaults are Llama's.

    Attributes:
        max_position_embeddings: the trained context, in tokens.
        norm_eps: added to the mean square (RMS norm) or to the variance (layer norm).
        rotary_dim: how many dimensions of a head are rotated.
        layers: one for each of ``num_hidden_layers``.
        attention_bias, output_bias, mlp_bias: whether there are biases on q, k and v; on o; on gate, up and down.
        norm: ``rms``, ``rms-offset`` (Gemma: the weight is one plus the stored weight) or ``layer``.
        norm_bias: whether layer norms have biases.
        norm_placement: norms ``before`` attention and MLP, ``after`` them, ``both``; or ``shared``: one norm before
            attention and MLP, which run in parallel.
        query_key_norm: the norm on queries and keys. ``head``: on each head, with one weight for all. ``heads``: on
            each head, the weights of all heads in one tensor. ``listed``: on each head, a tensor for each head's
            weight. ``width``: one norm over all heads together.
        local_rope: the rotary embedding of layers with ``rope="local"``.
        rope_interleaved: whether neighboring dimensions are rotated together, instead of the two halves of a head.
        attention_scale: scores are multiplied by it; None: ``head_dim ** -0.5``.
        attention_softcap, final_softcap: ``cap * tanh(x / cap)`` on scores and on logits.
        attention_sinks: whether each head has one more score, which takes part in the softmax but has no value.
        embedding_multiplier, residual_multiplier, logit_multiplier: embeddings, the outputs of attention and MLP, and
            logits are multiplied by these.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeScaling
    tie_word_embeddings: bool
    rotary_dim: int
    layers: tuple[LayerTraits, ...]
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm: NormKind = "rms"
    norm_bias: bool = False
    norm_placement: NormPlacement = "before"
    query_key_norm: QueryKeyNorm = "none"
    activation: Activation = "silu"
    local_rope: RopeScaling | None = None
    rope_interleaved: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    final_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    experts: ExpertsConfig | None = None

    @property
    def longest_context(self) -> int:
        """The longest context that the model can run with, in tokens: as trained, or as its rotary scaling allows."""
        if self.rope.kind == "dynamic":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_positions * self.rope.factor))
        return self.max_position_embeddings

    @property
    def default_context(self) -> int:
        """The context when none is asked for, in tokens. Dynamic scaling is used only beyond it."""
        return self.max_position_embeddings if self.rope.kind == "dynamic" else self.longest_context

    def context(self, asked: int | None) -> int:
        """The context to serve, in tokens: ``asked``, else the default.

        Raises:
            InvalidRequest: ``asked`` is more than :attr:`longest_context`.
        """
        longest = self.longest_context
        if asked is not None and asked > longest:
            raise InvalidRequest(
                f"A context of {asked} tokens is beyond the model's {longest} positions.",
                remedies=[Remedy({"max_context": longest})],
            )
        return asked or self.default_context

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token takes in the KV cache: keys and values of every layer.

        ``itemsize``: bytes of one element of the cache.
        """
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize
