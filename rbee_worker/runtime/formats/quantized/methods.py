"""Finds the quantization method of a checkpoint, and gives its tensors the shapes that the model expects.

Does not import torch: the arithmetic is in ``dequantize.py``.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from rbee_worker.errors import ModelUnsupported
from rbee_worker.escape import one_line
from rbee_worker.runtime.formats.checkpoint import Checkpoint
from rbee_worker.runtime.formats.quantized.bitsandbytes import read_bitsandbytes
from rbee_worker.runtime.formats.quantized.compressed import read_compressed
from rbee_worker.runtime.formats.quantized.fp8 import read_fp8
from rbee_worker.runtime.formats.quantized.gptq import read_awq, read_gptq
from rbee_worker.runtime.formats.quantized.options import QuantizationReader, quantization_section
from rbee_worker.runtime.formats.quantized.tensor import Format, QuantizedTensor, Stored
from rbee_worker.runtime.untrusted import ConfigReader

_MXFP4, _MXFP4_ARCHITECTURE = "mxfp4", "GptOssForCausalLM"

Read = Callable[[QuantizationReader], tuple[Format, tuple[str, ...]]]

METHODS: Mapping[str, Read] = MappingProxyType(
    {
        "fp8": read_fp8,
        "fbgemm_fp8": read_fp8,
        "gptq": lambda options: (read_gptq(options), ()),
        "awq": read_awq,
        "compressed-tensors": read_compressed,
        "bitsandbytes": read_bitsandbytes,
    }
)
"""Key: the value of ``quant_method``."""


def read_quantization(reader: ConfigReader) -> tuple[Format, tuple[str, ...]] | None:
    """The quantization that ``config.json`` describes.

    Returns:
        The method with its options, and the modules that are not quantized. None: the checkpoint is not quantized, or
        is gpt-oss in ``mxfp4``, which ``stacked_experts`` reads.

    Raises:
        ModelUnsupported: a method or an option that is not handled; the message names it.
        ModelMalformed: an option is missing or of the wrong type.
    """
    options = quantization_section(reader)
    if options is None:
        return None
    method = options.text("quant_method", "unnamed")
    if method == _MXFP4 and _MXFP4_ARCHITECTURE in (reader.values.get("architectures") or ()):
        return None
    if method not in METHODS:
        raise ModelUnsupported(
            f"{reader.file}: the checkpoint is quantized ({one_line(method)}), which this worker does not read.",
            hint=f"Read are {', '.join(METHODS)}; or use the original checkpoint.",
        )
    return METHODS[method](options)


def present(checkpoint: Checkpoint, config: Mapping[str, Any], *, file: str = "config.json") -> tuple[Checkpoint, str]:
    """Replace the stored parts of each quantized matrix by one tensor with the shape that the model expects.

    Args:
        checkpoint: the tensors as the files have them.
        config: what ``config.json`` holds.
        file: the name of the config in messages.

    Returns:
        The checkpoint, each quantized matrix as one :class:`QuantizedTensor`; and the form of storage for people:
        ``BF16``, or ``gptq 4-bit, groups of 128, dequantized``.

    Raises:
        ModelMalformed: an option is of the wrong type, or tensors and options disagree.
        ModelUnsupported: a method or an option that is not handled; the message names it.
    """
    found = read_quantization(ConfigReader(config, file))
    if found is None:
        return checkpoint, stored_as(checkpoint)
    format_, ignored = found
    stored = Stored(checkpoint, ignored)
    format_.present(stored)
    whole = stored.checkpoint()
    schemes = dict.fromkeys(info.scheme.what for info in whole.tensors.values() if isinstance(info, QuantizedTensor))
    return whole, f"{'; '.join(schemes)}, dequantized" if schemes else stored_as(checkpoint)


def stored_as(checkpoint: Checkpoint) -> str:
    """How the tensors of a plain checkpoint or a GGUF file are stored, for people: ``BF16``, or ``Q4_1, F32``."""
    if any(name.endswith("_blocks") for name in checkpoint.tensors):
        return f"{_MXFP4}, blocks of 32, dequantized"
    return ", ".join(checkpoint.dtypes)
