"""In which blocks a matrix is held that is quantized as it is loaded. Does not import torch."""

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

_LADDERS = {8: ("Q8_0",), 4: ("Q4_K", "Q4_1")}
"""Bits that are asked for -> the types, the best first. Rows must be whole blocks."""


def quantized_type(bits: int, columns: int, *, table: bool = False) -> str | None:
    """The type that a matrix is quantized to; None: it stays in 16 bits, since no type's blocks fill its rows.

    Args:
        bits: asked for, 4 or 8.
        columns: of the matrix.
        table: it is the embedding or the head. Their errors go into every token, and they keep eight bits.
    """
    ladder = _LADDERS[8 if table else bits]
    return next((name for name in ladder if columns % GGML_QUANT_SIZES[GGMLQuantizationType[name]][0] == 0), None)


def quantized_bytes(bits: int, rows: int, columns: int, *, table: bool = False, itemsize: int = 2) -> int:
    """Bytes of such a matrix; ``itemsize`` is that of a weight that stays as it is."""
    name = quantized_type(bits, columns, table=table)
    if name is None:
        return rows * columns * itemsize
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return rows * (columns // block) * size
