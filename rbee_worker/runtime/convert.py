"""Converts a model to a folder in Hugging Face layout: model.safetensors, config, tokenizer.

One tensor is in memory at a time, as stored; a quantized one is decoded a block of rows at a time. The weights are
written under a temporary name. The file gets its own name last, when everything else is on disk. So a conversion that
was killed never looks complete, and the next one starts again. Before the file is renamed, the safetensors library
opens it, to check that it holds what was to be written. The library does not write the file, because it would need
all tensors first, in memory or in a second file.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from rbee_worker.config import DTypeName
from rbee_worker.errors import Conflict, InvalidRequest, ModelMalformed, ModelUnsupported, RbeeError, Remedy, sentence
from rbee_worker.escape import one_line, quoted
from rbee_worker.runtime.files import open_unbuffered
from rbee_worker.runtime.formats.checkpoint import DTYPE_BYTES, TensorInfo
from rbee_worker.runtime.formats.gguf.model import dequantize, undo_rope_permutation
from rbee_worker.runtime.formats.quantized.options import quantization_section
from rbee_worker.runtime.formats.safetensors import SINGLE_NAME, read_header
from rbee_worker.runtime.source import ModelSource
from rbee_worker.runtime.untrusted import ConfigReader

PARTIAL_NAME: Final = f"{SINGLE_NAME}.partial"

_CODES: Final = MappingProxyType({"bfloat16": "BF16", "float16": "F16", "float32": "F32"})
_TORCH_NAMES: Final = MappingProxyType({"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"})
_FLOATS: Final = MappingProxyType({"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"})
_OVERFLOWS: Final = MappingProxyType({"F16": 65520.0, "BF16": 2.0**128 - 2.0**119, "F32": 2.0**128 - 2.0**103})
"""Numbers of this magnitude or larger round to infinity. It lies half a step above the dtype's largest number."""

_CHUNK_ELEMENTS: Final = 4 * 1024 * 1024
_FORMAT_VERSION: Final = "1"


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """How far a conversion is.

    Attributes:
        tensors_done, tensors_total: tensors that were passed to the operating system for writing; all tensors.
        bytes_written, bytes_total: the same for bytes of model.safetensors.
        finished: whether the folder is complete.
        already_converted: whether it was complete before, so that nothing was written.
    """

    tensors_done: int
    tensors_total: int
    bytes_written: int
    bytes_total: int
    finished: bool = False
    already_converted: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    """What will be written. It is decided before the first write."""

    source: ModelSource
    out: Path
    tensors: tuple[tuple[TensorInfo, str], ...]  # each with the dtype to write, in the order of the file
    header: bytes  # with the 8 bytes of its length
    metadata: dict[str, str]
    files: dict[str, str]  # the small files: name -> text

    @property
    def bytes_total(self) -> int:
        return len(self.header) + sum(info.parameters * DTYPE_BYTES[dtype] for info, dtype in self.tensors)


def convert(source: ModelSource, out: Path, *, dtype: DTypeName = "auto") -> Iterator[ConvertProgress]:
    """Write ``source`` to the folder ``out`` in Hugging Face layout.

    The call itself checks all that it can, before the first step of the iterator. Closing the iterator early removes
    the files that were written.

    Args:
        source: the model.
        out: a folder that does not exist, is empty, or holds an earlier conversion of the same model. If that one is
            complete, nothing is written; if not, the conversion starts again.
        dtype: the dtype of floating-point tensors. ``auto`` keeps them as stored, and decodes those of GGUF's quantized
            types to float16. Integer tensors are kept.

    Raises:
        InvalidRequest: ``out`` holds something else.
        ModelError: the model cannot be read or converted. For a value that does not fit, the iterator raises it.
        Conflict: another conversion is writing there (the iterator raises it).
        RbeeError: the disk is too small or fails.
    """
    plan = _plan(source, out, dtype)
    with _disk_errors(out):
        if _is_complete(plan):
            count, size = len(plan.tensors), (out / SINGLE_NAME).stat().st_size
            return iter([ConvertProgress(count, count, size, size, finished=True, already_converted=True)])
        _check_space(plan)
    return _run(plan)


def float32_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to bfloat16, ties to even. NaN stays NaN.

    Returns:
        The bits of the bfloat16 numbers, uint16 of the same shape.
    """
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    result: npt.NDArray[np.uint16] = np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    return result


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 numbers with these bfloat16 bits, of the same shape. The conversion is exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _plan(source: ModelSource, out: Path, dtype: DTypeName) -> _Plan:
    checkpoint = source.checkpoint
    if dtype != "auto" and _is_quantized(source):
        raise ModelUnsupported(
            f"{source.name} is quantized; in {dtype} its scales would be rounded, and every weight with them.",
            hint="Copy it as it is.",
            remedies=[Remedy({"dtype": "auto"})],
        )
    typed = [(info, _target(info, dtype)) for info in checkpoint.tensors.values()]
    # Wide elements first: every tensor then begins at a multiple of its element size, as readers that map files need.
    typed.sort(key=lambda pair: -DTYPE_BYTES[pair[1]])
    metadata = {
        "format": "pt",
        "converted_by": "rbee-worker",
        "converted_version": _FORMAT_VERSION,
        "source": source.name,
        "source_bytes": str(checkpoint.total_bytes),
        "dtype": dtype,
    }
    return _Plan(source, out, tuple(typed), _header(typed, metadata), metadata, _small_files(source, typed))


def _is_quantized(source: ModelSource) -> bool:
    """Whether several tensors make one matrix. That is so in quantized safetensors models, never in GGUF."""
    config = ConfigReader(source.config, "config.json")
    return source.format == "safetensors" and quantization_section(config) is not None


def _target(info: TensorInfo, dtype: DTypeName) -> str:
    if info.dtype not in DTYPE_BYTES:
        return "F16" if dtype == "auto" else _CODES[dtype]
    if dtype == "auto" or info.dtype not in _FLOATS:
        if dtype != "auto" and info.dtype.startswith("F8"):
            raise ModelUnsupported(
                f"{info.file.name}: tensor {quoted(info.name)} is stored as {info.dtype}, whose scales are in other "
                "tensors.",
                hint="It can only be kept as it is.",
                remedies=[Remedy({"dtype": "auto"})],
            )
        return info.dtype
    return _CODES[dtype]


def _header(typed: list[tuple[TensorInfo, str]], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for info, dtype in typed:
        begin, end = end, end + info.parameters * DTYPE_BYTES[dtype]
        entries[info.name] = {"dtype": dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _small_files(source: ModelSource, typed: list[tuple[TensorInfo, str]]) -> dict[str, str]:
    sizes: dict[str, int] = {}
    for info, dtype in typed:
        if dtype in _TORCH_NAMES:
            sizes[dtype] = sizes.get(dtype, 0) + info.parameters
    config = dict(source.config)
    if sizes:
        config["torch_dtype"] = _TORCH_NAMES[max(sizes, key=lambda name: sizes[name])]
        config.pop("dtype", None)  # the newer name of the same key
    tokenizer_config = dict(source.tokenizer_config)
    templates = source.chat_templates
    if list(templates) == ["default"]:
        tokenizer_config["chat_template"] = templates["default"]
    elif templates:
        tokenizer_config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    _ = source.tokenizer  # raises if the tokenizer is damaged, before anything is written
    contents = {"config.json": config, "generation_config.json": dict(source.generation_config)}
    contents["tokenizer_config.json"] = tokenizer_config
    files = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in contents.items() if value}
    return files | {"tokenizer.json": source.tokenizer_json}


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RbeeError(f"{error.filename or out}: {error.strerror or error}.") from error


def _is_complete(plan: _Plan) -> bool:
    """Whether ``out`` already holds this conversion.

    Raises:
        InvalidRequest: ``out`` holds something that must not be overwritten.
    """
    out = plan.out
    if out.exists() and not out.is_dir():
        raise InvalidRequest(f"{out} is a file.", hint="Name a folder to write to.")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if (out / SINGLE_NAME).is_file():
        try:
            tensors, found = read_header(out / SINGLE_NAME)
        except (ModelMalformed, ModelUnsupported):
            found, tensors = {}, {}
        ours = found == plan.metadata and tensors.keys() == {info.name for info, _ in plan.tensors}
        if ours and all((out / name).is_file() for name in plan.files):
            return True
        if found.get("converted_by") == plan.metadata["converted_by"]:
            raise InvalidRequest(
                f"{out} holds a conversion of {one_line(str(found.get('source')))} to "
                f"{one_line(str(found.get('dtype')))}.",
                hint="Name another folder.",
            )
    elif (out / PARTIAL_NAME).is_file():
        return False
    raise InvalidRequest(f"{out} is not empty and not an earlier conversion.", hint="Name another folder.")


def _check_space(plan: _Plan) -> None:
    existing = next(folder for folder in (plan.out, *plan.out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    # The file of an unfinished conversion is truncated when this one starts.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        free += (plan.out / PARTIAL_NAME).stat().st_size
    if free < plan.bytes_total:
        raise RbeeError(
            f"{plan.out}: the conversion takes {plan.bytes_total / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free.",
            hint="Free space, or name a folder on another disk.",
        )


def _run(plan: _Plan) -> Iterator[ConvertProgress]:
    partial = plan.out / PARTIAL_NAME
    with _disk_errors(plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as stream:
            _lock(plan, stream)
            try:
                yield from _write(plan, stream)
            except BaseException:
                if partial.exists():  # if not, the file was renamed already: the conversion is complete
                    _remove(plan)
                raise


def _remove(plan: _Plan) -> None:
    for name in plan.files:
        (plan.out / name).unlink(missing_ok=True)
        (plan.out / f"{name}.partial").unlink(missing_ok=True)
    (plan.out / PARTIAL_NAME).unlink(missing_ok=True)  # last: it marks the folder as ours


def _lock(plan: _Plan, stream: IO[bytes]) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Conflict(f"{plan.out}: another conversion is writing there.") from error
    # If another conversion renamed the file between our open and our lock, this stream is its finished file.
    if (plan.out / SINGLE_NAME).exists():
        (plan.out / PARTIAL_NAME).unlink(missing_ok=True)
        raise Conflict(f"{plan.out}: another conversion has just finished there.")


def _write(plan: _Plan, stream: IO[bytes]) -> Iterator[ConvertProgress]:
    stream.truncate(0)
    for name, text in plan.files.items():
        _write_text(plan.out / name, text)
    progress = ConvertProgress(0, len(plan.tensors), len(plan.header), plan.bytes_total)
    stream.write(plan.header)
    yield progress
    for done, (info, dtype) in enumerate(plan.tensors, 1):
        for chunk in _encoded(info, dtype):
            stream.write(chunk.data)
            progress = replace(progress, bytes_written=progress.bytes_written + chunk.nbytes)
        progress = replace(progress, tensors_done=done)
        yield progress
    stream.flush()
    os.fsync(stream.fileno())
    _check_written(plan)
    (plan.out / PARTIAL_NAME).rename(plan.out / SINGLE_NAME)
    _sync_folder(plan.out)
    yield replace(progress, finished=True)


def _check_written(plan: _Plan) -> None:
    """Open the file with the safetensors library, which checks the whole header, and compare with the plan."""
    path = plan.out / PARTIAL_NAME
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise _badly_written(path, sentence(one_line(str(error)))) from error
    found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    if metadata != plan.metadata or found != {info.name: (dtype, info.shape) for info, dtype in plan.tensors}:
        raise _badly_written(path, "its header is another.")


def _badly_written(path: Path, problem: str) -> RbeeError:
    return RbeeError(f"{path}: the file is not what was written: {problem}", hint="Is the disk sound? Convert again.")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encoded(info: TensorInfo, dtype: str) -> Iterator[npt.NDArray[Any]]:
    """The bytes of one tensor as they are written, a few million elements at a time."""
    data = _stored(info)
    if info.dtype == dtype and info.rope_heads == 0 and not info.shift:
        yield data
        return
    # The stored bytes in Hugging Face's row order, so that the rest can go row by row.
    if info.rope_heads:
        data = undo_rope_permutation(data, info.shape[0], info.rope_heads)
    rows = info.shape[0] if info.shape else 1
    width = info.parameters // rows if rows else 0
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    table = data.reshape(rows, -1) if rows else data.reshape(0, 0)
    for begin in range(0, rows, step):
        part = table[begin : begin + step]
        values = _decoded(info, part, (len(part), *info.shape[1:]))
        yield _rounded(info, values, dtype)


def _stored(info: TensorInfo) -> npt.NDArray[np.uint8]:
    data = np.empty(info.nbytes, dtype=np.uint8)
    try:
        with open_unbuffered(info.file) as stream:
            stream.seek(info.offset)
            position = 0
            while position < info.nbytes and (count := stream.readinto(data.data[position:])):
                position += count
    except OSError as error:
        raise ModelMalformed(f"{info.file}: cannot be read: {error.strerror or error}.") from error
    if position < info.nbytes:
        raise ModelMalformed(
            f"{info.file.name}: tensor {quoted(info.name)} ended after {position} of {info.nbytes} bytes.",
            hint="The file changed while it was read; start again.",
        )
    return data


def _decoded(info: TensorInfo, part: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Rows of a tensor as numbers: float32, or the stored dtype if that is float64 or float16."""
    if info.dtype not in DTYPE_BYTES:
        plain = replace(info, shape=shape, nbytes=part.size, rope_heads=0)
        return dequantize(plain, part)
    values = part.reshape(-1).view(_FLOATS[info.dtype]).reshape(shape)
    values = bfloat16_to_float32(values) if info.dtype == "BF16" else values
    return values.astype(np.float32) + np.float32(info.shift) if info.shift else values


def _rounded(info: TensorInfo, values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    if dtype in _OVERFLOWS and largest >= _OVERFLOWS[dtype]:
        raise ModelUnsupported(
            f"{info.file.name}: tensor {quoted(info.name)} holds {largest:g}, too large for {_TORCH_NAMES[dtype]}.",
            remedies=[Remedy({"dtype": "bfloat16"}), Remedy({"dtype": "float32"})],
        )
    if dtype == "BF16":
        return float32_to_bfloat16(np.ascontiguousarray(values, dtype=np.float32))
    return np.ascontiguousarray(values, dtype=_FLOATS[dtype])
