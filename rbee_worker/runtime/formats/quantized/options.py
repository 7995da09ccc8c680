"""Strict reading of ``quantization_config``. An option that was not read is refused: it may change the weights."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.escape import one_line, quoted
from rbee_worker.runtime.untrusted import ConfigReader

_KEYS: Final = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class QuantizationReader(ConfigReader):
    """``quantization_config``, or an object inside it. ``where``: its path in config.json, for messages."""

    where: str = "quantization_config"

    def one_of(self, key: str, default: str, allowed: Sequence[str]) -> str:
        """A string, in lower case.

        Raises:
            ModelUnsupported: it is not among ``allowed``.
            ModelMalformed: it is not a string.
        """
        value = self.text(key, default).lower()
        if value not in allowed:
            raise self.unsupported(key, value, f"Supported: {', '.join(allowed)}.")
        return value

    def bits(self, key: str, allowed: Sequence[int]) -> int:
        """A number of bits.

        Raises:
            ModelUnsupported: it is not among ``allowed``.
            ModelMalformed: it is missing, or not a positive integer.
        """
        value = self.integer(key)
        if value not in allowed:
            raise self.unsupported(key, value, f"Supported: {', '.join(map(str, allowed))}.")
        return value

    def group_size(self, key: str) -> int:
        """How many inputs share a scale; -1: all of a row. Raises as :meth:`integer` does."""
        if self.values.get(key) == -1:
            self.read.add(key)
            return -1
        return self.integer(key)

    def count(self, value: object, key: str) -> int:
        """A positive integer that stands inside the list under ``key``. Raises as :meth:`integer` does."""
        return ConfigReader({key: value}, self.file).integer(key)

    def names(self, *keys: str) -> tuple[str, ...]:
        """The strings of the lists under these keys. A key may be missing.

        Raises:
            ModelMalformed: a value is not a list of strings.
        """
        found: list[Any] = []
        for key in filter(self.has, keys):
            found += self.items(key)
            if not all(isinstance(name, str) for name in found):
                raise ModelMalformed(f"{self.file}: {self.where}.{key} is not a list of names.")
        return tuple(found)

    def inside(self, key: str) -> "QuantizationReader | None":
        """An object inside this one; None where it is null, empty or missing. Raises as :meth:`section` does."""
        section = self.section(key)
        return (
            None
            if section is None
            else QuantizationReader(section.values, self.file, where=f"{self.where}.{one_line(key)}")
        )

    def refuse_others(self, harmless: Collection[str] = ()) -> None:
        """Refuse options that were not read, unless they are harmless or their value is false, null, 0 or empty.

        Raises:
            ModelUnsupported: there is such an option; the message names it.
        """
        for key, value in self.values.items():
            if value and key not in self.read and key not in harmless:
                raise self.unsupported(key, value, "It may change what the weights are, so the model is not run.")

    def unsupported(self, key: str, value: object, hint: str) -> ModelUnsupported:
        """Make an error about an option's value."""
        return ModelUnsupported(
            f"{self.file}: {self.where}.{one_line(key)} is {quoted(value)}, which this worker does not read.", hint=hint
        )


def quantization_section(config: ConfigReader) -> QuantizationReader | None:
    """The object of ``config.json`` that says how the checkpoint is quantized; None: the checkpoint is not quantized.

    Its key is ``quantization_config``. compressed-tensors once wrote ``compression_config``, which is used where
    config.json has both.

    Raises:
        ModelMalformed: one of them is not an object.
    """
    found = None
    for key in _KEYS:
        section = config.section(key)
        if section is not None:
            found = QuantizationReader(section.values, config.file, where=key)
    return found
