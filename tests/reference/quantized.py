"""Quantized checkpoints of a tiny model, packed one value at a time from each format's published layout.

Written without a look at the loader: plain loops over rows and columns, where the loader shifts whole matrices. The
formats whose library runs on a CPU (compressed-tensors, bitsandbytes) are packed by that.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, Tensor]
Quantize = Callable[[Tensor], tuple[Parts, Tensor]]
"""A matrix, float32 [outputs, inputs] -> what is stored in place of ``weight``, and the weights that stands for."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def integers(weight: Tensor, groups: list[int], bits: int, *, symmetric: bool) -> tuple[Any, Any, Any]:
    """Unsigned values [outputs, inputs], zero points and float16 scales [groups, outputs], by minimum and maximum."""
    rows, count, most = weight.numpy(), max(groups) + 1, 2**bits - 1
    of = np.array(groups)
    scales = np.zeros((count, len(rows)), dtype=np.float16)
    zeros = np.zeros((count, len(rows)), dtype=np.int64)
    for group in range(count):
        values = rows[:, of == group]
        low, high = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[group] = ((high - low) / most).astype(np.float16)
        zeros[group] = 2 ** (bits - 1) if symmetric else np.round(-low / scales[group].astype(np.float32))
    zeros = zeros.clip(0, most)
    values = np.round(rows / scales.astype(np.float32)[of].T) + zeros[of].T
    return values.clip(0, most).astype(np.int64), zeros, scales


def twin(values: Any, zeros: Any, scales: Any, groups: list[int]) -> Tensor:
    """float32 weights, one at a time."""
    result = np.zeros(values.shape, dtype=np.float32)
    for row in range(values.shape[0]):
        for column, group in enumerate(groups):
            result[row, column] = np.float32(values[row, column] - zeros[group, row]) * np.float32(scales[group, row])
    return torch.from_numpy(result)


def gptq(*, bits: int, size: int, symmetric: bool, version: int, order: bool = False) -> Quantize:
    """``size``: of a group; -1: all inputs. ``order``: groups of inputs that are not neighbours."""

    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        outputs, inputs = weight.shape
        groups = [column // (size if size > 0 else inputs) for column in range(inputs)]
        if order:
            groups = [groups[place] for place in np.random.default_rng(inputs).permutation(inputs)]
        values, zeros, scales = integers(weight, groups, bits, symmetric=symmetric)
        per_word = 32 // bits
        packed = np.zeros((inputs // per_word, outputs), dtype=np.int64)
        for column in range(inputs):
            packed[column // per_word] |= values[:, column] << (bits * (column % per_word))
        stored = (zeros - (1 if version == 1 else 0)) % 2**bits
        packed_zeros = np.zeros((len(zeros), outputs // per_word), dtype=np.int64)
        for row in range(outputs):
            packed_zeros[:, row // per_word] |= stored[:, row] << (bits * (row % per_word))
        parts = {
            "qweight": _words(packed),
            "qzeros": _words(packed_zeros),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.tensor(groups, dtype=torch.int32),
        }
        return parts, twin(values, zeros, scales, groups)

    return quantize


def awq(size: int) -> Quantize:
    """AutoAWQ's ``gemm`` layout."""

    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        groups = [column // size for column in range(weight.shape[1])]
        values, zeros, scales = integers(weight, groups, 4, symmetric=False)

        def pack(rows: Any) -> Tensor:
            words = np.zeros((rows.shape[0], rows.shape[1] // 8), dtype=np.int64)
            for word in range(words.shape[1]):
                for place, column in enumerate(AWQ_ORDER):
                    words[:, word] |= rows[:, word * 8 + column] << (4 * place)
            return _words(words)

        parts = {"qweight": pack(values.T), "qzeros": pack(zeros), "scales": torch.from_numpy(scales)}
        return parts, twin(values, zeros, scales, groups)

    return quantize


def fp8(block: tuple[int, int] | None, dtype: torch.dtype = torch.float8_e4m3fn, *, name: str) -> Quantize:
    """``block``: outputs and inputs that share a scale; None: all. ``name``: of the scales."""

    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        rows, columns = weight.shape
        high, wide = block or (rows, columns)
        stored = torch.empty(weight.shape, dtype=dtype)
        whole = torch.empty(weight.shape)
        scales = torch.empty(-(-rows // high), -(-columns // wide))
        for down in range(scales.shape[0]):
            for across in range(scales.shape[1]):
                part = slice(down * high, (down + 1) * high), slice(across * wide, (across + 1) * wide)
                scale = weight[part].abs().max() / torch.finfo(dtype).max
                stored[part] = (weight[part] / scale).to(dtype)
                whole[part] = stored[part].float() * scale
                scales[down, across] = scale
        return {"weight": stored, name: scales if block else scales.view(())}, whole

    return quantize


def compressed(**arguments: Any) -> Quantize:
    """By compressed-tensors itself. ``arguments``: of its QuantizationArgs, and ``format``."""
    layout = arguments.pop("format")
    reorder = arguments.pop("reorder", False)

    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        weights = QuantizationArgs(**arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(4))
        if reorder:
            weight = weight[:, order]
        rows, columns = weight.shape
        high, wide = {
            "tensor": (rows, columns),
            "channel": (1, columns),
            "group": (1, arguments.get("group_size", 0)),
            "block": tuple(arguments.get("block_structure", ())),
        }[arguments["strategy"]]
        down, across = -(-rows // high), -(-columns // wide)
        blocks = [
            [weight[y * high : (y + 1) * high, x * wide : (x + 1) * wide] for x in range(across)] for y in range(down)
        ]
        low = torch.tensor([[float(block.min()) for block in line] for line in blocks])
        top = torch.tensor([[float(block.max()) for block in line] for line in blocks])
        scale, zero = calculate_qparams(low, top, weights)
        if arguments["strategy"] == "tensor":
            scale, zero = scale.view(1), zero.view(1)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(layout)
        stored = compressor.compress(state, scheme)
        whole = compressor.decompress(stored, scheme)["weight"].float()
        if reorder:
            # As it was saved while the library still reordered groups: values where they were, each input's group.
            back = order.argsort()
            groups = (torch.arange(columns) // wide)[back]
            stored = compressor.compress(state | {"weight": weight}, scheme)
            stored["weight_packed"] = _packed_columns(stored["weight_packed"], back, arguments["num_bits"])
            stored["weight_g_idx"] = groups.to(torch.int32)
            whole = whole[:, back]
        return {name: tensor.contiguous() for name, tensor in stored.items()}, whole.contiguous()

    return quantize


def _packed_columns(packed: Tensor, columns: Tensor, bits: int) -> Tensor:
    """Packed rows with their values in another order."""
    words = packed.numpy().astype(np.int64) % 2**32
    per_word = 32 // bits
    result = np.zeros_like(words)
    for place, column in enumerate(columns.tolist()):
        value = (words[:, column // per_word] >> (bits * (column % per_word))) % 2**bits
        result[:, place // per_word] |= value << (bits * (place % per_word))
    return _words(result)


def bitsandbytes(kind: str, *, nested: bool, block: int = 64) -> Quantize:
    """By bitsandbytes itself, named as transformers saves it."""

    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        from bitsandbytes import functional

        # Blocks run on over the ends of rows. The library's CPU kernel (0.50) decodes that wrongly, so it is given
        # rows of one block, which are the same values in the same bytes.
        blocks = weight.view(-1, block)
        stored, state = functional.quantize_4bit(blocks, blocksize=block, quant_type=kind, compress_statistics=nested)
        whole = functional.dequantize_4bit(stored, state).view(weight.shape)
        state.shape = weight.shape
        parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": stored} | parts, whole

    return quantize


def int8_rows(weight: Tensor) -> tuple[Parts, Tensor]:
    """bitsandbytes' int8: the largest magnitude of a row is 127."""
    largest = weight.abs().amax(dim=1)
    stored = (weight * (127 / largest[:, None])).round().to(torch.int8)
    whole = stored.float() * (largest / 127)[:, None]
    return {"weight": stored, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}, whole


def write(
    plain: Path, config: dict[str, Any], quantize: Quantize, *, head: bool = False, shards: int = 1
) -> tuple[Path, Path]:
    """A quantized copy of a model's folder, and its twin in float32 with the weights that the copy stands for."""
    tensors = load_file(plain / "model.safetensors")
    stored, whole = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("_proj.weight") or (head and name == "lm_head.weight"):
            del stored[name]
            parts, whole[name] = quantize(weight)
            stored |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in parts.items()}
    folders = plain.with_name("quantized"), plain.with_name("twin")
    for folder, content in zip(folders, (stored, whole), strict=True):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(plain, folder)
        save(folder, content, shards)
    values = json.loads((plain / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    return folders


def save(folder: Path, tensors: Parts, shards: int = 1) -> None:
    """Write a folder's weights; of several shards, each has every so many-th tensor."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _words(values: Any) -> Tensor:
    return torch.tensor([[_signed(int(word)) for word in row] for row in values], dtype=torch.int32)
