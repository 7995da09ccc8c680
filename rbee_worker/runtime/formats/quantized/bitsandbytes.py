"""bitsandbytes: 4 bits that index a table of 16 values (nf4, fp4), or int8 with a scale for each row.

transformers saves these tensors for 4 bits:

- ``weight``: two values a byte, the first in the upper half.
- ``weight.absmax``: a scale for each block of values. With ``bnb_4bit_use_double_quant`` the scales are quantized too.
- ``weight.quant_map``: the table.
- ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``): the bytes of a JSON object with the true shape.

For int8, ``SCB`` holds the largest magnitude of each row; the stored value 127 stands for it.
Layout: https://github.com/bitsandbytes-foundation/bitsandbytes (``functional.py``: ``QuantState``,
``int8_vectorwise_dequant``).
"""

import math
from dataclasses import dataclass
from typing import Any

from rbee_worker.errors import ModelMalformed
from rbee_worker.escape import quoted
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.quantized.options import QuantizationReader
from rbee_worker.runtime.formats.quantized.tensor import Codebook, Grouped, Stored, read_now
from rbee_worker.runtime.untrusted import parse_json_object

KINDS = ("nf4", "fp4")
_LEVELS = 16
_INT8_LEVELS = 127.0
_MAX_STATE_BYTES = 65536
_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True, slots=True)
class FourBitFormat:
    """Method ``bitsandbytes`` with ``load_in_4bit``."""

    def present(self, stored: Stored) -> None:
        """See :class:`Format`."""
        for kind in KINDS:
            for module in stored.modules(f"{_STATE}{kind}"):
                _gather(stored, module, kind)


@dataclass(frozen=True, slots=True)
class EightBitFormat:
    """Method ``bitsandbytes`` with ``load_in_8bit``."""

    def present(self, stored: Stored) -> None:
        """See :class:`Format`."""
        for module in stored.modules("SCB"):
            weight = stored.take(module, "weight", ("I8",), check=lambda shape: len(shape) == 2 and all(shape))  # noqa: PLR2004
            rows, columns = weight.shape
            parts = {"weight": weight, "scale": stored.take(module, "SCB", ("F32",), (rows,))}
            if stored.has(module, "weight_format"):  # 0 means by rows; transformers saves no other layout
                parts["row_format"] = stored.take(module, "weight_format", ("U8",), ())
            what = "bitsandbytes int8, a scale for each row"
            scheme = Grouped(what=what, packing="plain", block=(1, columns), divisor=_INT8_LEVELS)
            stored.put(module, (rows, columns), scheme, parts)


def read_bitsandbytes(options: QuantizationReader) -> tuple[FourBitFormat | EightBitFormat, tuple[str, ...]]:
    """The format that the options of ``bitsandbytes`` describe, and the modules that are not quantized.

    Raises:
        ModelUnsupported: an option that is not handled.
        ModelMalformed: an option of the wrong type, or ``load_in_4bit`` and ``load_in_8bit`` are both set or both off.
    """
    # transformers writes each of them twice. All are read, so refuse_others finds none left.
    keys = ("load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit")
    said = [options.boolean(key, default=False) for key in keys]
    four, eight = any(said[:2]), any(said[2:])
    if four == eight:
        raise ModelMalformed(
            f"{options.file}: {options.where} sets {'both' if four else 'neither'} of load_in_4bit and load_in_8bit."
        )
    if four:
        options.one_of("bnb_4bit_quant_type", "fp4", KINDS)
    ignored = options.names("llm_int8_skip_modules")
    harmless = {
        *("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant"),
        # for rounding activations, which this worker does not do
        *("llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload"),
    }
    options.refuse_others(harmless)
    return (FourBitFormat() if four else EightBitFormat()), ignored


def _gather(stored: Stored, module: str, kind: str) -> None:
    info = stored.take(module, f"{_STATE}{kind}", ("U8",), check=lambda shape: len(shape) == 1)
    shape, block, nested_block, nested_offset = _state(info, kind)
    values = math.prod(shape)
    # The bytes may be stored in a wider dtype, so only their number is checked.
    weight = stored.take(module, "weight", None)
    if weight.nbytes != (values + 1) // 2:
        raise Stored.malformed(weight, f"has {weight.nbytes} bytes; {list(shape)} in 4 bits takes {(values + 1) // 2}")
    blocks = -(-values // block)
    parts = {"weight": weight, "map": stored.take(module, "weight.quant_map", ("F32",), (_LEVELS,))}
    if nested_block:
        parts["absmax"] = stored.take(module, "weight.absmax", ("U8",), (blocks,))
        parts["nested_absmax"] = stored.take(module, "weight.nested_absmax", ("F32",), (-(-blocks // nested_block),))
        parts["nested_map"] = stored.take(module, "weight.nested_quant_map", ("F32",), (256,))
    else:
        parts["absmax"] = stored.take(module, "weight.absmax", ("F32",), (blocks,))
    what = f"bitsandbytes {kind}, blocks of {block}{', scales quantized' if nested_block else ''}"
    scheme = Codebook(what=what, block=block, nested_block=nested_block, nested_offset=nested_offset)
    stored.put(module, shape, scheme, parts)


def _state(info: TensorInfo, kind: str) -> tuple[tuple[int, int], int, int, float]:
    """Read the JSON in a tensor: the shape, the block size, the block size of nested scales (0: none), their offset."""
    what = f"{info.file.name}: tensor {quoted(info.name)}"
    state = parse_json_object(read_now(info, limit=_MAX_STATE_BYTES), what=what)
    options = QuantizationReader(state, what, where="quant_state")
    options.one_of("quant_type", kind, (kind,))
    block = options.integer("blocksize")
    rows, columns = (options.count(size, "shape") for size in options.items("shape", 2))
    if columns % 2:
        raise ModelMalformed(
            f"{what}: shape is {[rows, columns]}; rows of an odd length share bytes, which is not read."
        )
    nested = options.integer("nested_blocksize") if options.has("nested_blocksize") else 0
    offset = _number(state.get("nested_offset"), what) if nested else 0.0
    options.refuse_others(("dtype", "nested_dtype", "nested_offset"))
    return (rows, columns), block, nested, offset


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelMalformed(f"{what}: nested_offset is {quoted(value)}; it must be a number.")
    return float(value)
