"""Matrices in 8-bit floating point, with a scale for the matrix, for each row, or for each block.

``weight_scale_inv`` holds a scale for each block (DeepSeek, transformers' ``fp8``). Despite its name, the values are
multiplied by it. ``weight_scale`` holds one scale for the matrix, or one for each row (``fbgemm_fp8``). Either name is
accepted for either use. Layouts: https://huggingface.co/docs/transformers/quantization/finegrained_fp8 and
.../quantization/fbgemm_fp8
"""

from dataclasses import dataclass

from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.quantized.options import QuantizationReader
from rbee_worker.runtime.formats.quantized.tensor import FLOATS, Grouped, Stored

FP8 = ("F8_E4M3", "F8_E5M2")
_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale")


@dataclass(frozen=True, slots=True)
class FP8Format:
    """Methods ``fp8`` and ``fbgemm_fp8``.

    Attributes:
        block: outputs and inputs that share a scale; None: no blocks.
    """

    block: tuple[int, int] | None

    def present(self, stored: Stored) -> None:
        """See :class:`Format`."""
        for module in stored.modules("weight", FP8):
            weight = stored.take(module, "weight", FP8, check=lambda shape: len(shape) == 2 and all(shape))  # noqa: PLR2004
            put_scaled(stored, module, weight, self.block)
        stored.drop(*_ACTIVATIONS)


def put_scaled(stored: Stored, module: str, weight: TensorInfo, block: tuple[int, int] | None) -> None:
    """Replace a matrix [outputs, inputs] and its scales by one quantized tensor. The scales may have either name.

    Raises:
        ModelMalformed: the scales are missing, or their shape does not fit the matrix.
    """
    rows, columns = weight.shape
    kind = weight.dtype.removeprefix("F8_").lower()
    if block is not None:
        part = "weight_scale_inv" if stored.has(module, "weight_scale_inv") else "weight_scale"
        high, wide = block
        scale = stored.take(module, part, FLOATS, (-(-rows // high), -(-columns // wide)))
        scheme = Grouped(what=f"fp8 ({kind}), blocks of {high}x{wide}", packing="plain", block=block)
    else:
        part = "weight_scale" if stored.has(module, "weight_scale") else "weight_scale_inv"
        scale = stored.take(module, part, FLOATS, (), (1,), (1, 1), (rows, 1), (rows,))
        each = scale.parameters == rows and rows > 1
        what = f"fp8 ({kind}), a scale for each {'row' if each else 'tensor'}"
        scheme = Grouped(what=what, packing="plain", block=(1 if each else rows, columns))
    stored.put(module, (rows, columns), scheme, {"weight": weight, "scale": scale})


def read_fp8(options: QuantizationReader) -> tuple[FP8Format, tuple[str, ...]]:
    """The format that the options of ``fp8`` or ``fbgemm_fp8`` describe, and the modules that are not quantized.

    Raises:
        ModelUnsupported: an option that is not handled.
        ModelMalformed: an option of the wrong type.
    """
    block = None
    if options.has("weight_block_size"):
        high, wide = options.items("weight_block_size", 2)
        block = (options.count(high, "weight_block_size"), options.count(wide, "weight_block_size"))
    options.one_of("fmt", "e4m3", ("e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2"))
    options.one_of("scale_fmt", "float", ("float", "ue8m0"))
    options.one_of("expert_dtype", "fp8", ("fp8",))
    ignored = options.names("modules_to_not_convert", "ignored_layers")
    # This worker does not round activations, and the tensors show which modules are quantized.
    harmless = ("activation_scheme", "activation_scale_ub", "dequantize", "modules_to_convert", "kv_cache_scheme")
    options.refuse_others(harmless)
    return FP8Format(block), ignored
