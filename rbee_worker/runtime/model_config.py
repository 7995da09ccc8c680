"""ModelConfig: what the decoder needs to know, read from a Hugging Face ``config.json``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rbee_worker.errors import ModelMalformed, ModelUnsupported

RopeKind = Literal["default", "linear", "llama3"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3")

_MAX_DIMENSION = 2**24
"""No model comes near; a larger figure is damage, and is refused before it sizes an allocation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Rotary embedding parameters (config keys ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``).

    Attributes:
        kind: ``default``, ``linear`` (positions divided by ``factor``) or ``llama3`` (long wavelengths divided
            by ``factor``, short ones kept, smooth between).
        theta: base of the frequencies.
        factor, low_freq_factor, high_freq_factor, original_max_positions: as the config names them.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of a decoder. Sizes are counts; ``rms_norm_eps`` is added to the mean square."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeScaling
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one cached position takes: keys and values of every layer."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize


def parse_config(config: Mapping[str, Any], *, file: str, supported: tuple[str, ...]) -> ModelConfig:
    """Read ``config.json``.

    Args:
        config: the parsed file.
        file: its name, for messages.
        supported: architecture names this worker runs.

    Raises:
        ModelUnsupported: another architecture, or a key that changes the mathematics and is not handled.
        ModelMalformed: a key is missing, of the wrong type, or inconsistent with another.
    """
    reader = _Reader(config, file)
    architecture = _architecture(config, file, supported)
    _refuse_unhandled(config, file)
    heads = reader.integer("num_attention_heads")
    hidden = reader.integer("hidden_size")
    kv_heads = reader.integer("num_key_value_heads", heads)
    if config.get("head_dim") is None and hidden % heads:
        raise ModelMalformed(f"{file}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    head_dim = reader.integer("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelMalformed(
            f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
        )
    if head_dim % 2:
        raise ModelMalformed(f"{file}: head_dim {head_dim} is odd; rotary embedding needs an even one.")
    return ModelConfig(
        architecture=architecture,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=reader.integer("max_position_embeddings", 2048),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=_rope(config, file),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", default=False),
        attention_bias=reader.boolean("attention_bias", default=False),
        mlp_bias=reader.boolean("mlp_bias", default=False),
    )


def _architecture(config: Mapping[str, Any], file: str, supported: tuple[str, ...]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelMalformed(f"{file}: 'architectures' names no model class.")
    name: str = names[0]
    if name not in supported:
        raise ModelUnsupported(
            f"{file}: architecture {name} is not supported.", hint=f"Supported: {', '.join(supported)}."
        )
    return name


def _refuse_unhandled(config: Mapping[str, Any], file: str) -> None:
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, Mapping) else "unnamed"
        raise ModelUnsupported(
            f"{file}: the checkpoint is quantized ({method}), which this worker does not read.",
            hint="Use the original checkpoint, or a GGUF file of it.",
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelUnsupported(f"{file}: hidden_act {activation!r} is not supported; silu is.")


def _rope(config: Mapping[str, Any], file: str) -> RopeScaling:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ModelMalformed(f"{file}: the rotary parameters are not an object.")
    reader = _Reader(parameters, file)
    theta = reader.number("rope_theta", _Reader(config, file).number("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    partial = _Reader(config, file).number("partial_rotary_factor", reader.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ModelUnsupported(f"{file}: partial_rotary_factor {partial:g} is not supported; 1 is.")
    if kind == "default":
        return RopeScaling(theta=theta)
    if kind == "linear":
        return RopeScaling(kind="linear", theta=theta, factor=reader.number("factor"))
    if kind == "llama3":
        low, high = reader.number("low_freq_factor"), reader.number("high_freq_factor")
        if low >= high:
            raise ModelMalformed(f"{file}: low_freq_factor {low:g} is not below high_freq_factor {high:g}.")
        return RopeScaling(
            kind="llama3",
            theta=theta,
            factor=reader.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_positions=reader.integer("original_max_position_embeddings"),
        )
    raise ModelUnsupported(
        f"{file}: rotary scaling {kind!r} is not supported.", hint=f"Supported: {', '.join(ROPE_KINDS)}."
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to a JSON object, with the file and the key in every complaint."""

    values: Mapping[str, Any]
    file: str

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_DIMENSION:
            raise ModelMalformed(f"{self.file}: {key} is {value!r:.80}; it must be a positive integer.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ModelMalformed(f"{self.file}: {key} is {value!r:.80}; it must be a positive number.")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ModelMalformed(f"{self.file}: {key} is {value!r:.80}; it must be true or false.")
        return value

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelMalformed(f"{self.file}: {key} is missing.")
        return value
