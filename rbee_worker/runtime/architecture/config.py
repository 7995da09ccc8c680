"""ModelConfig: what the decoder needs to know of a model. ``table.py`` reads it from a ``config.json``."""

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
        factor, low_freq_factor, high_freq_factor, beta_fast, beta_slow, truncate, short_factor, long_factor: as the
            config names them.
        original_max_positions: the context before scaling.
        attention_factor: of cosines and sines.
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
    """What one layer may have differently from its neighbours.

    Attributes:
        window: a query sees this many positions, its own included; None: all before it.
        rope: which rotary embedding: the model's, its local one (Gemma 3), or none (SmolLM3).
        experts: whether the MLP is a mixture of experts.
    """

    window: int | None = None
    rope: Literal["global", "local", "none"] = "global"
    experts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts.

    Attributes:
        count, active: experts in a layer, and how many of them a token goes through.
        intermediate_size: of one expert.
        renormalise: whether the weights of the chosen ones are made to sum to one.
        bias: whether the router and the experts' matrices have biases.
        clamp: gpt-oss's limit on gate and up (``swiglu_limit``); None: the plain gated activation.
        alpha: of the clamped activation (``swiglu_alpha``).
        mxfp4: stored in four bits, in blocks of 32 with a shared exponent.
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
    """Shapes and constants of a decoder; the defaults are Llama's. Sizes are counts.

    Attributes:
        norm_eps: added to the mean square, or to the variance.
        attention_bias, output_bias, mlp_bias: biases of q, k and v; of o; of gate, up and down.
        layers: one for each of ``num_hidden_layers``; filled in when left empty.
        norm: ``rms``, ``rms-offset`` (Gemma: stored weights are added to one) or ``layer``.
        norm_bias: whether layer norms have biases.
        norm_placement: norms before attention and MLP, after them, both, or one norm before the two side by side.
        query_key_norm: of queries and keys: one weight for all heads, one tensor with each head's, each head's in a
            tensor of its own, or one norm over all heads together.
        rotary_dim: how many of a head's dimensions are rotated; ``rope_interleaved``: in pairs of neighbours, not of
            halves.
        attention_scale: of the scores; None: ``head_dim ** -0.5``.
        attention_softcap, final_softcap: ``cap * tanh(x / cap)`` on scores and logits.
        attention_sinks: each head has a score that takes its share of the softmax and gives nothing.
        embedding_multiplier, residual_multiplier, logit_multiplier: of embeddings, branches and logits.
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
        """Positions that the model can be run with: what it was trained for, or what its rotary scaling reaches."""
        if self.rope.kind == "dynamic":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_positions * self.rope.factor))
        return self.max_position_embeddings

    @property
    def default_context(self) -> int:
        """The longest context of one setting of its frequencies: dynamic scaling stretches them only when asked to."""
        return self.max_position_embeddings if self.rope.kind == "dynamic" else self.longest_context

    def context(self, asked: int | None) -> int:
        """The context to serve, in tokens: what was asked for, else all that the model has.

        Raises:
            InvalidRequest: more than the model has.
        """
        longest = self.longest_context
        if asked is not None and asked > longest:
            raise InvalidRequest(
                f"A context of {asked} tokens is beyond the model's {longest} positions.",
                remedies=[Remedy({"max_context": longest})],
            )
        return asked or self.default_context

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one cached position takes: keys and values of every layer."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize
