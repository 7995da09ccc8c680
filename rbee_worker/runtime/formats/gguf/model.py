"""A GGUF file presented as a Hugging Face model: names, shapes, config.json.

Nothing above this module knows ggml's names and conventions. One of them is the row order of Llama's query and key
projections. llama.cpp stores the rows for a rotary embedding over neighboring pairs; Hugging Face stores them for one
over the two halves of a head. ``dequantize`` puts the rows back in Hugging Face's order.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as ggml_dequantize

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.escape import quoted
from rbee_worker.runtime.files import open_file
from rbee_worker.runtime.formats.checkpoint import Checkpoint, TensorInfo
from rbee_worker.runtime.formats.gguf.families import ARCHITECTURES, ROPE_FACTORS, Architecture
from rbee_worker.runtime.formats.gguf.header import GGUFHeader, GGUFTensor, read_header, special_token
from rbee_worker.runtime.untrusted import MAX_COUNT

_DOWNLOAD_AGAIN: Final = "Download the file again."

TENSOR_TYPES: Final = frozenset(
    {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
)
"""ggml's types that are read."""

END_OF_TURN_TOKENS: Final = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")
"""Control tokens that end a turn in every vocabulary that has them. Some files do not name them in the metadata."""

_EXPERTS_DIMENSIONS: Final = 3

_BLOCK: Final = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")


LLAMA3_ROPE: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""``rope_scaling`` of every published Llama 3.1, 3.2 and 3.3. Only the factor differs between them (8 or 32)."""


def read_gguf(path: Path) -> "GGUFModel":
    """Read the header of a GGUF file; the weights are not read.

    Raises:
        ModelNotFound: no such file.
        ModelMalformed: the file cannot be read, is damaged or inconsistent.
        ModelUnsupported: an architecture, tensor type or version that is not read.
    """
    header = read_header(path)
    name = header.metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise ModelUnsupported(
            f"{path.name}: the architecture is {quoted(name)}; supported in GGUF files: {', '.join(ARCHITECTURES)}.",
            hint="Use the model's safetensors folder if its family is supported there.",
        )
    return GGUFModel(path, header, str(name), architecture)


@dataclass(frozen=True)
class GGUFModel:
    """One GGUF file.

    Attributes:
        path: the file.
        header: its header.
        prefix: of the architecture's metadata keys: the value of ``general.architecture``.
        architecture: how its names map to Hugging Face's.
    """

    path: Path
    header: GGUFHeader
    prefix: str
    architecture: Architecture

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors under their Hugging Face names.

        Raises:
            ModelUnsupported: a tensor that the architecture does not have, or a type that is not read.
            ModelMalformed: a shape that does not fit the head count, or no valid head count.
        """
        rope = ("rope_freqs.weight", *ROPE_FACTORS.values())
        tensors = (tensor for tensor in self.header.tensors if tensor.name not in rope)
        infos = [info for tensor in tensors for info in self._infos(tensor)]
        return Checkpoint(MappingProxyType({info.name: info for info in infos}), (self.path,))

    def config(self) -> dict[str, Any]:
        """What Hugging Face's config.json of this model would hold.

        Raises:
            ModelMalformed: a value is missing or impossible.
            ModelUnsupported: a feature that changes the results and is not supported.
        """
        heads, kv_heads = self.count("attention.head_count"), self.count("attention.head_count_kv")
        hidden = self.count("embedding_length")
        head_dim, theta = self._head_dim(hidden, heads), float(str(np.float32(self._number("rope.freq_base", 10000.0))))
        names = self.checkpoint.tensors
        config: dict[str, Any] = {
            "architectures": [self.architecture.name],
            "model_type": self.architecture.model_type,
            "hidden_size": hidden,
            "intermediate_size": self.count("feed_forward_length"),
            "num_hidden_layers": self.count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self.count("context_length"),
            "vocab_size": self.vocabulary_size,
            # The metadata holds a 32-bit float; its shortest decimal is what config.json said: 1e-05.
            "rms_norm_eps": float(str(np.float32(self._number("attention.layer_norm_rms_epsilon")))),
            "rope_theta": theta,
            "tie_word_embeddings": "lm_head.weight" not in names,
            "torch_dtype": "float16",
        }
        self._refuse_experts()
        config |= self._own(config)
        scaling = self._rope_scaling(head_dim, theta)
        if scaling is not None:
            config["rope_scaling"] = scaling
        return config | self._token_ids()

    def _own(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of config.json that only this family has."""
        names = self.checkpoint.tensors
        own: dict[str, Any] = dict(self.architecture.constants)
        if self.architecture.biases:
            own["attention_bias"] = any(name.endswith("self_attn.q_proj.bias") for name in names)
            own["mlp_bias"] = any(name.endswith("mlp.up_proj.bias") for name in names)
        for key, name in self.architecture.numbers.items():
            value = self._value(key)
            own[name] = None if value is None or value == 0 else self._number(key)
        if self.architecture.partial_rotary:
            own["partial_rotary_factor"] = self._number("rope.dimension_count", config["head_dim"]) / config["head_dim"]
        if self.architecture.scale_of_heads:
            # GGUF does not store this scale. As in llama.cpp, the number of layers tells the one exception.
            by_heads = config["num_hidden_layers"] == self.architecture.scale_of_heads
            per_head = config["hidden_size"] // config["num_attention_heads"]
            own["query_pre_attn_scalar"] = per_head if by_heads else config["head_dim"]
        return own

    def generation_config(self) -> dict[str, Any]:
        """What generation_config.json would hold: ``bos_token_id``, ``pad_token_id`` and ``eos_token_id``.

        A token without an id in the metadata is left out. ``eos_token_id`` is a list when several tokens end
        generation.

        Raises:
            ModelMalformed: an id is outside the vocabulary.
        """
        ids = self._token_ids()
        ends = [ids["eos_token_id"]] if "eos_token_id" in ids else []
        ends += [found[0] for role in ("eot", "eom") if (found := self.special_token(role)) is not None]
        tokens = self.header.metadata.get("tokenizer.ggml.tokens", [])
        types = self.header.metadata.get("tokenizer.ggml.token_type", [])
        control = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == 3}  # noqa: PLR2004 (control)
        ends += [control[token] for token in END_OF_TURN_TOKENS if token in control]
        unique = list(dict.fromkeys(ends))
        if unique:
            ids["eos_token_id"] = unique[0] if len(unique) == 1 else unique
        return ids

    @property
    def vocabulary_size(self) -> int:
        """The number of rows of the embedding.

        Raises:
            ModelMalformed: there is no embedding.
        """
        embedding = self.checkpoint.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise self._malformed("there is no token_embd.weight.")
        return embedding.shape[0]

    def count(self, key: str) -> int:
        """A whole number above 0 from the metadata of the architecture; ``key`` is without the prefix.

        Without ``attention.head_count_kv``, ``attention.head_count`` stands for it.

        Raises:
            ModelMalformed: the value is missing or something else.
            ModelUnsupported: the value differs from layer to layer.
        """
        value = self._value(key)
        if value is None and key == "attention.head_count_kv":
            return self.count("attention.head_count")
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list):
            raise ModelUnsupported(f"{self.path.name}: {self.prefix}.{key} differs from layer to layer.")
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self._malformed(f"{self.prefix}.{key} is {quoted(value)}; it must be a whole number above 0.")
        return value

    def special_token(self, role: str) -> tuple[int, str] | None:
        """See :func:`~.header.special_token`."""
        return special_token(self.header.metadata, role, file=self.path.name)

    def chat_template(self) -> str | None:
        """The Jinja chat template; None where the file has none."""
        template = self.header.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def _malformed(self, problem: str) -> ModelMalformed:
        return ModelMalformed(f"{self.path.name}: {problem}", hint=_DOWNLOAD_AGAIN)

    def _value(self, key: str, default: Any = None) -> Any:
        value = self.header.metadata.get(f"{self.prefix}.{key}")
        return default if value is None else value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise self._malformed(f"{self.prefix}.{key} is {quoted(value)}; it must be a number above 0.")
        return value

    def _head_dim(self, hidden: int, heads: int) -> int:
        if self._value("attention.key_length") is None and hidden % heads:
            raise self._malformed(f"{heads} heads do not divide {self.prefix}.embedding_length {hidden}.")
        head_dim = self.count("attention.key_length") if self._value("attention.key_length") else hidden // heads
        partial = ("rope.dimension_count",) if not self.architecture.partial_rotary else ()
        for key in ("attention.value_length", *partial):
            value = self._value(key, head_dim)
            if value != head_dim:
                raise ModelUnsupported(
                    f"{self.path.name}: {self.prefix}.{key} is {quoted(value)}; only the head size, {head_dim}, is "
                    "supported."
                )
        return head_dim

    def _refuse_experts(self) -> None:
        experts = self._value("expert_count", 0)
        if experts and not self.architecture.experts:
            raise ModelUnsupported(
                f"{self.path.name}: a mixture of {quoted(experts)} experts in a GGUF file is not supported."
            )

    def _token_ids(self) -> dict[str, Any]:
        roles = (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id"))
        return {key: found[0] for role, key in roles if (found := self.special_token(role)) is not None}

    def _infos(self, tensor: GGUFTensor) -> list[TensorInfo]:
        """What Hugging Face has for a tensor: one, or one for each expert, whose bytes are side by side in the file."""
        match = _BLOCK.fullmatch(tensor.name)
        name = self.architecture.experts.get(match[2]) if match is not None else None
        if match is None or name is None:
            return [self._info(tensor)]
        count = self.count("expert_count")
        if len(tensor.shape) != _EXPERTS_DIMENSIONS or tensor.shape[0] != count or count > MAX_COUNT:
            raise self._malformed(
                f"tensor {quoted(tensor.name)} has shape {list(tensor.shape)}; it must be [experts, outputs, inputs], "
                f"of {count} experts (at most {MAX_COUNT})."
            )
        self._check_type(tensor)
        layer, part, size = f"model.layers.{int(match[1])}", match[3], tensor.nbytes // count
        return [
            TensorInfo(
                f"{layer}.{name.format(number)}.{part}",
                tensor.shape[1:],
                tensor.type.name,
                self.path,
                tensor.offset + number * size,
                size,
            )
            for number in range(count)
        ]

    def _check_type(self, tensor: GGUFTensor) -> None:
        if tensor.type.name not in TENSOR_TYPES:
            raise ModelUnsupported(
                f"{self.path.name}: tensor {quoted(tensor.name)} is stored as {tensor.type.name}; supported: "
                f"{', '.join(sorted(TENSOR_TYPES))}."
            )

    def _info(self, tensor: GGUFTensor) -> TensorInfo:
        self._check_type(tensor)
        heads = 0
        name = self.architecture.outer.get(tensor.name)
        match = _BLOCK.fullmatch(tensor.name)
        if match is not None and match[2] in self.architecture.block:
            name = f"model.layers.{int(match[1])}.{self.architecture.block[match[2]]}.{match[3]}"
            key = self.architecture.interleaved_rope.get(match[2])
            heads = self.count(key) if key is not None else 0
        if name is None:
            self._refuse_experts()
            raise ModelUnsupported(
                f"{self.path.name}: tensor {quoted(tensor.name)} is not part of a {self.prefix!r} model as known here."
            )
        if heads and tensor.shape[0] % (2 * heads):
            raise self._malformed(
                f"tensor {quoted(tensor.name)} has {tensor.shape[0]} rows, which {heads} heads of an even size do not "
                "make."
            )
        shift = self.architecture.norm_shift if name.endswith("norm.weight") else 0.0
        return TensorInfo(name, tensor.shape, tensor.type.name, self.path, tensor.offset, tensor.nbytes, heads, shift)

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        kind = self._value("rope.scaling.type", "none")
        tensors = {tensor.name: tensor for tensor in self.header.tensors}
        if any(name in tensors for name in ROPE_FACTORS.values()):
            return self._longrope(tensors, self._value("rope.dimension_count", head_dim))
        if kind == "yarn":
            return self._yarn()
        if kind not in ("none", "linear"):
            raise ModelUnsupported(
                f"{self.path.name}: {self.prefix}.rope.scaling.type is {quoted(kind)}; supported: none, linear, yarn, "
                "LongRoPE's by rope_factors, and Llama 3's by rope_freqs.weight."
            )
        key = "rope.scaling.factor" if kind == "linear" else "rope.scale_linear"
        factor = float(self._number(key, 1.0))
        stored = tensors.get("rope_freqs.weight")
        divisors = None if stored is None else self._rope_divisors(stored, head_dim)
        if divisors is None or np.all(divisors == 1):
            return None if factor == 1 else {"rope_type": "linear", "type": "linear", "factor": factor}
        largest = float(divisors.max())
        if factor != 1 or not np.allclose(divisors, llama3_divisors(head_dim, theta, largest), rtol=1e-4):
            raise ModelUnsupported(
                f"{self.path.name}: rope_freqs.weight (largest value {largest:g}) is not Llama 3's scaling of rotary "
                "frequencies."
            )
        return {"rope_type": "llama3", "factor": largest, **LLAMA3_ROPE}

    def _yarn(self) -> dict[str, Any]:
        known = {"type", "factor", "original_context_length", "finetuned"}
        prefix = f"{self.prefix}.rope.scaling."
        for key in self.header.metadata:
            if key.startswith(prefix) and key.removeprefix(prefix) not in known:
                raise ModelUnsupported(f"{self.path.name}: {quoted(key)} is not supported.")
        original = self.count("rope.scaling.original_context_length")
        factor = float(self._number("rope.scaling.factor"))
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}

    def _longrope(self, tensors: Mapping[str, GGUFTensor], rotary_dim: int) -> dict[str, Any]:
        scaling: dict[str, Any] = {"rope_type": "longrope", "type": "longrope"}
        for key, name in ROPE_FACTORS.items():
            if name not in tensors or not self.architecture.partial_rotary:
                raise self._malformed(f"there is no {name} beside the other, or the family has none.")
            scaling[key] = self._rope_divisors(tensors[name], rotary_dim).tolist()
        factor = self._value("rope.scaling.attn_factor")
        return scaling if factor is None else scaling | {"attention_factor": self._number("rope.scaling.attn_factor")}

    def _rope_divisors(self, tensor: GGUFTensor, head_dim: int) -> npt.NDArray[np.float32]:
        if tensor.type != GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
            raise self._malformed(
                f"{tensor.name} is {tensor.type.name} of shape {tensor.shape}; it must be F32 of ({head_dim // 2},)."
            )
        with open_file(self.path) as stream:
            stream.seek(tensor.offset)
            data = stream.read(tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise self._malformed(f"the file ended while {tensor.name} was read.")
        divisors = np.frombuffer(data, dtype="<f4")
        if not np.isfinite(divisors).all():
            raise self._malformed(f"tensor {quoted(tensor.name)} holds numbers that are not finite.")
        return divisors


def llama3_divisors(head_dim: int, theta: float, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3's scaling divides each rotary frequency by: float64 [head_dim / 2].

    Source: ``apply_scaling`` in Meta's code of Llama 3.1, with ``LLAMA3_ROPE``. Frequencies with a wavelength above
    ``original / low`` are divided by ``factor``. Those with one below ``original / high`` are kept. Between the two the
    frequency is interpolated.
    """
    original = LLAMA3_ROPE["original_max_position_embeddings"]
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return divisors


def undo_rope_permutation(data: npt.NDArray[np.uint8], rows: int, heads: int) -> npt.NDArray[np.uint8]:
    """Put the rows of a query or key projection back in Hugging Face's order.

    llama.cpp's converter moves row ``half * d/2 + i`` of each head to row ``2 * i + half`` (half 0 or 1, d the head
    size). Rows can be moved as bytes, because no quantized block crosses a row.

    Args:
        data: the stored bytes, uint8 of any shape.
        rows: how many rows the tensor has; a multiple of ``2 * heads``.
        heads: how many heads it has.

    Returns:
        A new array, uint8 [rows, bytes per row].
    """
    per_head = data.reshape(heads, rows // heads // 2, 2, -1)
    return np.ascontiguousarray(per_head.swapaxes(1, 2)).reshape(rows, -1)


def dequantize(info: TensorInfo, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Decode one stored tensor of a GGUF file.

    Args:
        info: the tensor.
        data: its bytes, uint8 of any shape.

    Returns:
        float32 of ``info.shape``, rows in Hugging Face's order.

    Raises:
        ModelMalformed: ``data`` is not ``info.nbytes`` long.
    """
    if data.size != info.nbytes:
        raise ModelMalformed(
            f"{info.file.name}: tensor {quoted(info.name)} has {data.size} of its {info.nbytes} bytes.",
            hint=_DOWNLOAD_AGAIN,
        )
    if info.rope_heads:
        data = undo_rope_permutation(data, info.shape[0], info.rope_heads)
    row_count = math.prod(info.shape[:-1])
    decoded = ggml_dequantize(data.reshape(row_count, -1), GGMLQuantizationType[info.dtype])
    values: npt.NDArray[np.float32] = np.asarray(decoded, dtype=np.float32).reshape(info.shape)
    return values + np.float32(info.shift) if info.shift else values
