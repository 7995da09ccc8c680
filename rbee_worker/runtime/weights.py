"""From tensors in files to the parts of a decoder: which tensor goes where, reading, converting.

The plan is made from headers alone and is strict both ways: a name the model needs and the files lack, a name the
files hold and the model does not know, and a shape that disagrees with the config all fail before a byte is read.

Memory: a group (the embedding, one decoder layer, the output) is read tensor by tensor into host buffers, moved to
its device, and turned into its final form. At most ``readers`` groups are in flight, so the host never holds more
than two groups beyond what is resident; packing adds the float32 copy of one matrix (or of a block of it).
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.runtime.architectures import Architecture, layer_shapes
from rbee_worker.runtime.checkpoint import Checkpoint, TensorInfo
from rbee_worker.runtime.gguf import dequantize
from rbee_worker.runtime.linear import LinearFormat
from rbee_worker.runtime.model_config import ModelConfig
from rbee_worker.runtime.transformer import DecoderLayer, Embedding, Output, Part

_CHUNK_BYTES = 8 * 2**20
_READERS = 2

_PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """Tensors that become one part of the decoder, by role."""

    kind: Literal["embedding", "layer", "output"]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)


def plan_weights(config: ModelConfig, architecture: Architecture, checkpoint: Checkpoint) -> list[WeightGroup]:
    """The groups in loading order: embedding, layers by number, output.

    Raises:
        ModelMalformed: a tensor is missing, left over, or of another shape than the config says.
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
        return info

    groups = [WeightGroup("embedding", {"embedding": take(architecture.embedding, table)})]
    shapes = layer_shapes(config)
    for index in range(config.num_hidden_layers):
        prefix = architecture.layer_prefix.format(index)
        tensors = {}
        for role, shape in shapes.items():
            stem, _, suffix = role.rpartition(".")
            tensors[role] = take(f"{prefix}{architecture.layer[stem]}.{suffix}", shape)
        groups.append(WeightGroup("layer", tensors))
    output = {"norm": take(architecture.norm, (config.hidden_size,))}
    if config.tie_word_embeddings:
        left.pop(architecture.head, None)
    else:
        output["head"] = take(architecture.head, table)
    groups.append(WeightGroup("output", output))
    leftover = [name for name in left if not name.endswith(architecture.ignored_suffixes)]
    if leftover:
        shown = ", ".join(f"'{name}'" for name in sorted(leftover)[:3])
        raise ModelMalformed(
            f"{_files(checkpoint)}: {len(leftover)} tensors are not part of {config.architecture} "
            f"with {config.num_hidden_layers} layers: {shown}{', …' if len(leftover) > len(shown) else ''}.",
            hint="Does config.json belong to this checkpoint?",
        )
    return groups


class WeightReader:
    """Reads groups and builds parts on a few threads; hands the parts out in order.

    Closing it stops the threads at their next chunk of 8 MiB and drops what they hold.

    Attributes:
        bytes_total: bytes of all tensors; bytes_read: bytes read so far.
        started_at: ``time.monotonic()`` when reading began.
        last_byte_at: ``time.monotonic()`` of the latest chunk.
        reading: name of the file read last.
    """

    def __init__(
        self, groups: Sequence[WeightGroup], config: ModelConfig, form: LinearFormat, device: torch.device
    ) -> None:
        self.bytes_total = sum(info.nbytes for group in groups for info in group.tensors.values())
        self.bytes_read = 0
        self.started_at = self.last_byte_at = time.monotonic()
        self.reading = ""
        self._config, self._form, self._device = config, form, device
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="weight-reader")
        self._waiting = iter(groups)
        self._running: list[Future[Part]] = []
        for _ in range(_READERS):
            self._start_next()

    def next_part(self, timeout: float) -> Part | None:
        """The next part, or None when it is not there within ``timeout`` seconds.

        Raises:
            StopIteration: every part has been handed out.
            ModelMalformed: a file ended early or could not be read.
        """
        if not self._running:
            raise StopIteration
        done, _ = wait(self._running[:1], timeout)
        if not done:
            return None
        part = self._running.pop(0).result()
        self._start_next()
        return part

    def close(self) -> None:
        """Stop reading and drop what is in flight."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._running.clear()

    def _start_next(self) -> None:
        group = next(self._waiting, None)
        if group is not None:
            self._running.append(self._pool.submit(self._build, group))

    def _build(self, group: WeightGroup) -> Part:
        weights: dict[str, Tensor] = {}
        for role, info in group.tensors.items():
            weights[role] = to_tensor(info, self._read(info)).to(self._device)
        if group.kind == "layer":
            return DecoderLayer(self._config, weights, self._form)
        return (Embedding if group.kind == "embedding" else Output)(self._config, weights, self._form)

    def _read(self, info: TensorInfo) -> np.ndarray:
        buffer = np.empty(info.nbytes, dtype=np.uint8)
        self.reading = info.file.name
        try:
            with info.file.open("rb", buffering=0) as file:
                file.seek(info.offset)
                self._fill(file, buffer, info)
        except OSError as error:
            raise ModelMalformed(f"{info.file}: cannot be read: {error.strerror or error}.") from error
        return buffer

    def _fill(self, file: BinaryIO, buffer: np.ndarray, info: TensorInfo) -> None:
        view, done = buffer.data, 0
        while done < info.nbytes:
            if self._stop.is_set():
                raise InterruptedError
            count = file.readinto(view[done : done + _CHUNK_BYTES])  # type: ignore[attr-defined]
            if not count:
                raise ModelMalformed(
                    f"{info.file.name}: ends inside tensor '{info.name}', {info.nbytes - done} bytes short.",
                    hint="Was the file changed while it was being read?",
                )
            done += count
            with self._lock:
                self.bytes_read += count
                self.last_byte_at = time.monotonic()


def to_tensor(info: TensorInfo, data: np.ndarray) -> Tensor:
    """A host tensor of ``info.shape`` over ``data`` (uint8 [nbytes]); quantized GGUF blocks become float32.

    Raises:
        ModelUnsupported: the stored dtype is none that weights come in.
    """
    if info.dtype in _PLAIN_DTYPES and not info.rope_heads:
        return torch.from_numpy(data).view(_PLAIN_DTYPES[info.dtype]).reshape(info.shape)
    if info.file.suffix == ".gguf":
        return torch.from_numpy(dequantize(info, data))
    raise ModelUnsupported(
        f"{info.file.name}: tensor '{info.name}' is stored as {info.dtype}.",
        hint=f"Weights may be {', '.join(_PLAIN_DTYPES)}.",
    )


def _files(checkpoint: Checkpoint) -> str:
    files = checkpoint.files
    return files[0].name if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
