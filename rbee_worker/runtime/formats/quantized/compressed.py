"""compressed-tensors: integers or 8-bit floats, plain or packed, by rules that name modules.

Each entry of ``config_groups`` names modules (``targets``: a class, a name, or ``re:`` and a regular expression). It
says how many bits their weights have, and which weights share a scale. Values are signed. Packed values and packed
zero points are stored with half their range added.
Layout: https://github.com/vllm-project/compressed-tensors (``compressors``).
"""

import re
from dataclasses import dataclass
from typing import Literal

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.escape import one_line, quoted
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.quantized.options import QuantizationReader
from rbee_worker.runtime.formats.quantized.tensor import FLOATS, WORD_BITS, Grouped, Packing, Stored, groups_of, names

FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale")
_OBSERVED = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype", "dynamic", "actorder"})
_MAX_REPEATS = 4
"""Repeats (``*``, ``+``, ``{``) in one regular expression. The time to match can grow with the length of the name to
the power of their number."""

Strategy = Literal["tensor", "channel", "group", "block"]


@dataclass(frozen=True, slots=True)
class WeightRule:
    """How the weights of some modules are stored.

    Attributes:
        targets: the modules, as :func:`~.tensor.names` takes them, or ``Linear`` for all.
        packed: whether values are packed in words of 32 bits.
        kind: ``int`` or ``float``.
        bits: of a value.
        symmetric: whether there are no zero points.
        strategy: which weights share a scale; ``channel`` is a row.
        block: outputs and inputs that share a scale; used where ``strategy`` is ``group`` or ``block``.
    """

    targets: tuple[str, ...]
    packed: bool
    kind: str
    bits: int
    symmetric: bool
    strategy: Strategy
    block: tuple[int, int]

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """How many outputs and inputs share a scale in a matrix [rows, columns]."""
        return {"tensor": (rows, columns), "channel": (1, columns)}.get(self.strategy, self.block)

    def what(self) -> str:
        """The name of the format, for people."""
        name = f"{self.kind}{self.bits}" if not self.packed else f"{self.bits}-bit"
        high, wide = self.block
        shared = {
            "tensor": "a scale for each tensor",
            "channel": "a scale for each row",
            "group": groups_of(wide),
            "block": f"blocks of {high}x{wide}",
        }[self.strategy]
        return f"compressed-tensors {name}, {shared}"


@dataclass(frozen=True, slots=True)
class CompressedFormat:
    """Method ``compressed-tensors``. ``rules``: in the order of the config."""

    rules: tuple[WeightRule, ...]

    def present(self, stored: Stored) -> None:
        """See :class:`Format`."""
        for module in stored.modules("weight_packed"):
            packed = stored.take(module, "weight_packed", ("I32",), check=_is_matrix)
            self._put(stored, module, packed)
        for module in stored.modules("weight", ("I8", "F8_E4M3")):
            self._put(stored, module, stored.take(module, "weight", ("I8", "F8_E4M3"), check=_is_matrix))
        stored.drop(*_ACTIVATIONS)

    def _put(self, stored: Stored, module: str, weight: TensorInfo) -> None:
        rule = self._rule(weight, module)
        rows, columns = weight.shape
        if rule.packed:
            columns *= WORD_BITS // rule.bits
        high, wide = rule.grid(rows, columns)
        across, down = -(-columns // wide), -(-rows // high)
        shapes: list[tuple[int, ...]] = [(down, across)]
        shapes += [(down,)] if across == 1 else []
        shapes += [()] if across == down == 1 else []
        parts = {"weight": weight, "scale": stored.take(module, "weight_scale", FLOATS, *shapes)}
        zeros: Packing = "plain"
        if not rule.symmetric or stored.has(module, "weight_zero_point"):
            if rule.packed and not rule.symmetric and rule.strategy != "tensor":
                zeros = "columns"
                words = -(-down * rule.bits // WORD_BITS)
                parts["zero"] = stored.take(module, "weight_zero_point", ("I32",), (words, across))
            else:
                parts["zero"] = stored.take(module, "weight_zero_point", ("I8", "F8_E4M3"), *shapes)
        if stored.has(module, "weight_g_idx"):
            parts["order"] = stored.take(module, "weight_g_idx", ("I32", "I64"), (columns,))
        if rule.packed:
            parts["shape"] = stored.take(module, "weight_shape", ("I64", "I32"), (2,))
        scheme = Grouped(
            what=rule.what(),
            packing="rows" if rule.packed else "plain",
            bits=rule.bits,
            centre=2 ** (rule.bits - 1) if rule.packed else 0,
            zeros=zeros,
            block=(high, wide),
        )
        stored.put(module, (rows, columns), scheme, parts)

    def _rule(self, weight: TensorInfo, module: str) -> WeightRule:
        """The rule for a module. A rule that names the module comes before one for its class."""
        found = [rule for rule in self.rules if any(names(target, module) for target in rule.targets)]
        found += [rule for rule in self.rules if "Linear" in rule.targets]
        if not found:
            raise Stored.malformed(weight, "is quantized, but no config group of config.json targets its module")
        rule = found[0]
        stored_as = {"I32": (True, "int"), "I8": (False, "int")}.get(weight.dtype, (False, "float"))
        if stored_as != (rule.packed, rule.kind):
            raise Stored.malformed(weight, f"is {weight.dtype}; config.json says {rule.what()}")
        return rule


def read_compressed(options: QuantizationReader) -> tuple[CompressedFormat, tuple[str, ...]]:
    """The format that the options of ``compressed-tensors`` describe, and the modules that are not quantized.

    Raises:
        ModelUnsupported: an option that is not handled.
        ModelMalformed: an option of the wrong type, or no weights are named.
    """
    layout = options.one_of("format", "", (*FORMATS, "mixed-precision"))
    groups = options.inside("config_groups")
    rules = []
    for name in groups.values if groups is not None else ():
        group = groups.inside(name) if groups is not None else None
        rule = None if group is None else _rule(group, layout)
        rules += [] if rule is None else [rule]
    if not rules:
        raise ModelMalformed(f"{options.file}: {options.where}.config_groups names no weights.")
    ignored = _patterns(options, "ignore")
    sparsity = options.inside("sparsity_config")
    if sparsity is not None:
        sparsity.one_of("format", "dense", ("dense",))
    # The status is not needed: the tensors themselves show whether they are compressed.
    options.refuse_others(("quantization_status", "global_compression_ratio", "version", "kv_cache_scheme"))
    return CompressedFormat(tuple(rules)), ignored


def _rule(group: QuantizationReader, layout: str) -> WeightRule | None:
    targets = _patterns(group, "targets")
    layout = group.one_of("format", layout, FORMATS)
    weights = group.inside("weights")
    # This worker does not round activations.
    group.refuse_others(("input_activations", "output_activations"))
    if weights is None:
        return None
    kind = weights.one_of("type", "int", ("int", "float"))
    bits = weights.bits("num_bits", (4, 8) if layout == "pack-quantized" else (8,))
    symmetric = weights.boolean("symmetric", default=True)
    size = weights.group_size("group_size") if weights.has("group_size") else None
    derived = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.one_of("strategy", derived, ("tensor", "channel", "group", "block"))
    block = (1, size or -1)
    if strategy == "block":
        high, wide = weights.items("block_structure", 2)
        block = (weights.count(high, "block_structure"), weights.count(wide, "block_structure"))
    elif strategy == "group" and block[1] < 1:
        raise ModelMalformed(f"{weights.file}: {weights.where}.group_size is {size}; groups have a size.")
    if layout == "pack-quantized" and (kind != "int" or strategy == "block"):
        raise ModelUnsupported(f"{weights.file}: {weights.where}: {kind} by {strategy} is not read packed.")
    weights.refuse_others(_OBSERVED)
    return WeightRule(targets, layout == "pack-quantized", kind, bits, symmetric, strategy, block)  # type: ignore[arg-type]


def _patterns(options: QuantizationReader, key: str) -> tuple[str, ...]:
    """Names of modules, and regular expressions for them. Expressions that could take very long are refused."""
    found = options.names(key)
    for pattern in (name.removeprefix("re:") for name in found if name.startswith("re:")):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelMalformed(
                f"{options.file}: {options.where}.{key}: {quoted(pattern)}: {one_line(str(error))}."
            ) from error
        if len(re.findall(r"[*+{]", pattern)) > _MAX_REPEATS or re.search(r"\)[*+{]", pattern):
            raise options.unsupported(key, pattern, f"Expressions may repeat {_MAX_REPEATS} things, and no groups.")
    return found


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and all(shape)  # noqa: PLR2004
