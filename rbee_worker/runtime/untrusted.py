"""Reads JSON and config values that strangers wrote.

JSON is parsed strictly and within limits. :class:`ConfigReader` gives typed access to ``config.json`` and remembers
which keys were read. An unread key is refused if it may change what the model computes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.escape import one_line, quoted
from rbee_worker.runtime.files import read_bytes

MAX_JSON_BYTES = 2**25
"""Bytes of a JSON text, such as a safetensors header or an index file. The format allows headers of 100 MB. But an
index of 281,000 tensors (61 layers of 384 experts, with three matrices in four parts each) takes only 28 MB."""

MAX_JSON_VALUES = 2**20
"""Values in a JSON text. Python's parser lets no other thread run while it works, and a million values take it half a
second. A header with the largest allowed number of tensors, each with its three fields, has fewer."""

_MAX_DIGITS = 100
"""Digits of an integer in JSON. The time to read one grows with the square of them. Known files have up to 31."""

_DOWNLOAD_AGAIN: Final = "Download the file again."

MAX_DIMENSION = 2**24
"""Largest size in a config. No model comes near. A larger number is damage, and is refused before memory is taken."""

_SMALLEST, _LARGEST = 1e-30, 1e30
"""Bounds of the numbers in a config that are not whole. Products of a few of them are still numbers; so is each of them
in 32 bits."""

MAX_COUNT = 4096
"""The same for the number of layers or experts."""

HARMLESS = frozenset(
    {
        # for training, other tasks and other software
        *("initializer_range", "pretraining_tp", "router_aux_loss_coef", "router_jitter_noise", "neftune_noise_alpha"),
        *("output_router_logits", "output_attentions", "output_hidden_states", "model_max_length", "pruned_heads"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "cache_implementation"),
        *("tie_encoder_decoder", "cross_attention_hidden_size", "chunk_size_feed_forward", "use_embedding_sharing"),
        # repeat what another key says
        *("layer_switch", "order_of_interleaved_layers", "use_gated_activation", "use_parallel_block"),
        *("use_parallel_embedding", "initial_context_length", "experts_per_token", "is_llama_config"),
        *("sliding_window_pattern", "_sliding_window_pattern", "_pre_quantization_dtype", "temperature"),
    }
)
"""Keys that look as if they changed what the model computes, but do not."""

_MATHEMATICAL = re.compile(
    "rope|rotary|norm|scal|multiplier|cap|window|attn|attention|bias|act|clip|alibi|position|expert|router|residual|"
    "parallel|sink|temperature|factor|limit|eps|theta|swiglu|chunk|sparse|pool|head|rank|lora|mamba|ssm|conv|shared|"
    "embed|logit|interval|layer|block|group|pattern|hidden|multi|mtp|qkv|quant"
)
_NEUTRAL_AT_ONE = re.compile("multiplier|scal|factor|mod|pct|ratio|interval|group|temperature")
_DROPOUT = re.compile("drop")


def parse_json_object(
    data: bytes, *, what: str, hint: str = _DOWNLOAD_AGAIN, most_values: int = MAX_JSON_VALUES
) -> dict[str, Any]:
    """Parse one JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, no very long integers.

    Args:
        data: the text.
        what: its name for messages, such as ``config.json`` or ``model.safetensors: the header``.
        hint: the hint of the errors.
        most_values: how many values it may hold. They are counted by commas before the text is parsed, so commas in
            strings count too.

    Raises:
        ModelMalformed: the text is not such an object, or breaks a limit.
    """
    _check_values(data, most_values, what, hint)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ModelMalformed(f"{what} names {quoted(twice)} twice.", hint=hint)
        return result

    def constant(name: str) -> Any:
        raise ModelMalformed(f"{what} holds {name}, which is not JSON.", hint=hint)

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ModelMalformed(
                f"{what} holds an integer of {len(digits)} digits; {_MAX_DIGITS} are allowed.", hint=hint
            )
        return int(digits)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_int=integer)
    except UnicodeDecodeError as error:
        raise ModelMalformed(f"{what} is not UTF-8 (byte {error.start}).", hint=hint) from error
    except json.JSONDecodeError as error:
        raise ModelMalformed(
            f"{what} is not JSON: {error.msg} (line {error.lineno}, column {error.colno}).", hint=hint
        ) from error
    except RecursionError as error:
        raise ModelMalformed(f"{what} is nested too deeply.", hint=hint) from error
    if not isinstance(value, dict):
        raise ModelMalformed(f"{what} is not a JSON object but of type {type(value).__name__}.", hint=hint)
    return value


def _check_values(data: bytes, most: int, what: str, hint: str) -> None:
    commas = data.count(b",")  # there is one between two values
    if commas >= most:
        raise ModelMalformed(
            f"{what} holds {commas} commas; less than {most} are allowed, for each parts two values.", hint=hint
        )


def read_json_object(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read one JSON object from a file of at most ``limit`` bytes.

    Raises:
        ModelNotFound: no such file.
        ModelMalformed: the file cannot be read, is too large, or is not a JSON object.
    """
    return parse_json_object(read_bytes(path, limit=limit), what=path.name)


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Typed access to a JSON object. A value of null counts as missing.

    Attributes:
        values: the object.
        file: the file's name for messages.
        read: the keys that were read so far.
    """

    values: Mapping[str, Any]
    file: str
    read: set[str] = field(default_factory=set)

    def has(self, key: str) -> bool:
        """Whether there is a value other than null. The key counts as read."""
        return self._get(key, None) is not None

    def integer(self, key: str, default: int | None = None, *, most: int = MAX_DIMENSION) -> int:
        """A positive integer, at most ``most``.

        Raises:
            ModelMalformed: the value is something else, or is missing and there is no default.
        """
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise ModelMalformed(
                f"{self.file}: {key} is {quoted(value)}; it must be a positive integer of at most {most}."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number between 1e-30 and 1e30. Raises as :meth:`integer` does."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _SMALLEST <= value <= _LARGEST:
            raise ModelMalformed(
                f"{self.file}: {key} is {quoted(value)}; it must be a positive number from {_SMALLEST} to {_LARGEST}."
            )
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        """True or false. Raises as :meth:`integer` does."""
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise ModelMalformed(f"{self.file}: {key} is {quoted(value)}; it must be true or false.")
        return value

    def text(self, key: str, default: str) -> str:
        """A string. Raises as :meth:`integer` does."""
        value = self._required(key, default)
        if not isinstance(value, str):
            raise ModelMalformed(f"{self.file}: {key} is {quoted(value)}; it must be a string.")
        return value

    def optional_integer(self, key: str) -> int | None:
        """As :meth:`integer`; None where it is null or missing."""
        return self.integer(key) if self.has(key) else None

    def optional_number(self, key: str) -> float | None:
        """As :meth:`number`; None where it is null or missing."""
        return self.number(key) if self.has(key) else None

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of ``count`` positive numbers. Raises as :meth:`integer` does."""
        values = self.items(key, count)
        return tuple(ConfigReader({key: value}, self.file).number(key) for value in values)

    def items(self, key: str, count: int | None = None) -> list[Any]:
        """A list; of ``count`` values, if that is given. Raises as :meth:`integer` does."""
        value = self._required(key, None)
        if not isinstance(value, list) or (count is not None and len(value) != count):
            length = "" if count is None else f" of {count} values"
            raise ModelMalformed(f"{self.file}: {key} is {quoted(value)}; it must be a list{length}.")
        return value

    def section(self, key: str) -> "ConfigReader | None":
        """An object inside this one; None where it is null, empty or missing.

        Raises:
            ModelMalformed: the value is not an object.
        """
        value = self._get(key, None)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise ModelMalformed(f"{self.file}: {key} is {quoted(value)}; it must be an object.")
        return ConfigReader(value, self.file)

    def refuse_unread(self, family: str) -> None:
        """Refuse keys that were not read and may change what the model computes.

        Raises:
            ModelUnsupported: there is such a key; the message names it and ``family``.
        """
        for key, value in self.values.items():
            if key in self.read or key in HARMLESS or _is_off(key, value) or not _MATHEMATICAL.search(key):
                continue
            raise ModelUnsupported(
                f"{self.file}: {one_line(key)} is {quoted(value)}, which this worker does not handle for {family}.",
                hint="It may change what the model computes, so the model is not run without it.",
            )

    def _required(self, key: str, default: object) -> Any:
        value = self._get(key, default)
        if value is None:
            raise ModelMalformed(f"{self.file}: {key} is missing.")
        return value

    def _get(self, key: str, default: object) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value


def _is_off(key: str, value: object) -> bool:
    """Whether a setting changes nothing: dropout, a false or empty value, or a factor of 1."""
    if _DROPOUT.search(key) or not value:
        return True
    return value == 1 and not isinstance(value, bool) and _NEUTRAL_AT_ONE.search(key) is not None
