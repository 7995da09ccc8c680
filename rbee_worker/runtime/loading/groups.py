"""Which tensor of a checkpoint goes where in a decoder.

The grouping is made from headers alone and is strict both ways: a name the model needs and the files lack, a name the
files hold and the model does not know, and a shape that disagrees with the config all fail before a byte is read.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.escape import quoted
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.architecture.roles import stored_shapes, tensor_name
from rbee_worker.runtime.architecture.table import Architecture
from rbee_worker.runtime.formats.checkpoint import Checkpoint, TensorInfo
from rbee_worker.runtime.formats.quantized.tensor import QuantizedTensor, is_idle_bias

PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Stored dtypes that torch has too, by the words of safetensors headers."""

MXFP4_SUFFIXES = ("_blocks", "_scales")
"""Names of tensors of bytes that are decoded on their way."""

_SHOWN = 3
"""Names of tensors that a message shows."""


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """Tensors that become one part of the decoder, by role."""

    kind: Literal["embedding", "layer", "output"]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    index: int = 0  # of a layer


def group_weights(config: ModelConfig, architecture: Architecture, checkpoint: Checkpoint) -> list[WeightGroup]:
    """The groups in loading order: embedding, output, layers by number.

    Raises:
        ModelMalformed: a tensor is missing, left over, or of another shape than the config says.
        ModelUnsupported: a tensor's stored dtype is none that weights come in.
    """
    left = dict(checkpoint.tensors)
    table = (config.vocab_size, config.hidden_size)

    def take(name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = left.pop(name, None)
        if info is None:
            raise ModelMalformed(
                f"{_files(checkpoint)}: tensor '{name}' is missing.", hint="Is the checkpoint complete?"
            )
        if info.shape != shape:
            raise ModelMalformed(
                f"{info.file.name}: tensor '{name}' has shape {list(info.shape)}; config.json says {list(shape)}."
            )
        if not (name.endswith(MXFP4_SUFFIXES) and info.dtype == "U8"):
            _check_dtype(info)
        return info

    groups = [WeightGroup("embedding", {"embedding": take(architecture.embedding, table)})]
    output = {"norm.weight": take(f"{architecture.norm}.weight", (config.hidden_size,))}
    if config.norm_bias:
        output["norm.bias"] = take(f"{architecture.norm}.bias", (config.hidden_size,))
    if config.tie_word_embeddings:
        left.pop(architecture.head, None)
    else:
        output["head"] = take(architecture.head, table)
    groups.append(WeightGroup("output", output))
    for index in range(config.num_hidden_layers):
        shapes = stored_shapes(config, index)
        tensors = {role: take(tensor_name(architecture, index, role), shape) for role, shape in shapes.items()}
        groups.append(WeightGroup("layer", tensors, index))
    leftover = [
        name for name in left if not name.endswith(architecture.ignored_suffixes) and not is_idle_bias(checkpoint, name)
    ]
    if leftover:
        shown = ", ".join(map(quoted, sorted(leftover)[:_SHOWN]))
        raise ModelMalformed(
            f"{_files(checkpoint)}: {len(leftover)} tensors are not part of {config.architecture} "
            f"with {config.num_hidden_layers} layers: {shown}{', …' if len(leftover) > _SHOWN else ''}.",
            hint="Does config.json belong to this checkpoint?",
        )
    return groups


def _check_dtype(info: TensorInfo) -> None:
    if info.dtype not in PLAIN_DTYPES and info.file.suffix != ".gguf" and not isinstance(info, QuantizedTensor):
        raise ModelUnsupported(
            f"{info.file.name}: tensor '{info.name}' is stored as {info.dtype}.",
            hint=f"Weights may be {', '.join(PLAIN_DTYPES)}.",
        )


def _files(checkpoint: Checkpoint) -> str:
    files = checkpoint.files
    return files[0].name if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
