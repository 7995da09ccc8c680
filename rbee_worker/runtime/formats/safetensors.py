"""Headers of safetensors files, read without torch and without reading the weights.

A safetensors file begins with the length of its header, 8 bytes, little-endian. The header is JSON: it maps each
tensor's name to its dtype, shape and ``data_offsets`` (begin and end, counted from the end of the header). The data
follow. Every file is untrusted: a header is checked in full before memory is taken for its tensors.
Format: https://github.com/huggingface/safetensors#format
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

from rbee_worker.errors import ModelMalformed, ModelNotFound, ModelUnsupported
from rbee_worker.escape import quoted
from rbee_worker.runtime.files import open_file
from rbee_worker.runtime.formats.checkpoint import DTYPE_BYTES, MAX_ELEMENTS, MAX_TENSORS, Checkpoint, TensorInfo
from rbee_worker.runtime.untrusted import MAX_JSON_BYTES, parse_json_object, read_json_object

MAX_DIMENSIONS = 8
"""Dimensions of a tensor. The format sets no limit. Most weights have two, and none has more than five."""

MAX_METADATA = 2**12
"""Entries of ``__metadata__``. Usual files have one to a hundred."""

MAX_FILES = 10_000
"""Files that an index may name. The largest models have a few hundred."""

UNREADABLE_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"})
"""Dtypes of the format that are not read: no supported model stores its weights in them."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TEMPLATES_FOLDER = "additional_chat_templates"
"""The folder, inside a model's folder, that holds chat templates beside the default one."""

_LONGEST_NAME = 200
"""Characters in the name of a file. File systems allow 255 bytes."""

_DOWNLOAD_AGAIN = "Download the file again."
_SHARD_STEM = re.compile(r"-\d{5}-of-\d{5}$")
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})


def read_safetensors(folder_or_file: Path) -> Checkpoint:
    """Read the headers of a model: one file, or a folder with ``model.safetensors`` or an index of shards.

    The index decides when there is one: files and tensors that it does not name are ignored.

    Raises:
        ModelNotFound: no such file or folder, or a folder without weights.
        ModelMalformed: a header or the index is damaged or hostile, a shard is missing, the file is a single shard, or
            it is unclear which files make the model.
        ModelUnsupported: the folder has pickle files only, or a tensor has a dtype that is not read.
    """
    path = folder_or_file
    if path.is_file():
        if _SHARD_STEM.search(path.stem):
            raise ModelMalformed(
                f"{path.name} is one shard of a model, not all of it.", hint=f"Name the folder: {path.parent}"
            )
        return _single(path)
    if not path.is_dir():
        raise ModelNotFound(f"{path}: no such file or folder.")
    if (path / INDEX_NAME).is_file():
        return _sharded(path)
    if (path / SINGLE_NAME).is_file():
        return _single(path / SINGLE_NAME)
    return _single(_only_candidate(path))


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check one file's header.

    Returns:
        The tensors by name, in the order of their offsets, and the ``__metadata__``.

    Raises:
        ModelMalformed: the file cannot be read, is truncated, or its header is wrong.
        ModelUnsupported: a dtype that is not read.
    """
    try:
        with open_file(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            header = _read_raw_header(path.name, stream.read(8), size, stream.read)
    except OSError as error:
        raise ModelMalformed(f"{path}: cannot be read: {error.strerror or error}.") from error
    start = 8 + len(header)
    entries = parse_json_object(header, what=f"{path.name}: the header")
    metadata = _metadata(path.name, entries.pop("__metadata__", None))
    if len(entries) > MAX_TENSORS:
        raise ModelMalformed(
            f"{path.name}: the header names {len(entries)} tensors; {MAX_TENSORS} are allowed.", hint=_DOWNLOAD_AGAIN
        )
    infos = [_tensor(path, name, entry, start, size) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.offset + info.nbytes))
    _check_layout(path.name, infos, start, size)
    return {info.name: info for info in infos}, metadata


def _read_raw_header(name: str, prefix: bytes, size: int, read: Callable[[int], bytes]) -> bytes:
    if len(prefix) < 8:  # noqa: PLR2004 (the length field of the format)
        raise ModelMalformed(
            f"{name}: the file is {size} bytes, shorter than the 8 bytes of a header length.", hint=_DOWNLOAD_AGAIN
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_JSON_BYTES:
        raise ModelMalformed(
            f"{name}: the header claims {length} bytes; {MAX_JSON_BYTES} are allowed.", hint=_DOWNLOAD_AGAIN
        )
    if length > size - 8:
        raise ModelMalformed(
            f"{name}: the header claims {length} bytes, but only {size - 8} follow its length.", hint=_DOWNLOAD_AGAIN
        )
    data = read(length)
    if len(data) != length:
        raise ModelMalformed(
            f"{name}: the header of {length} bytes ended after {len(data)} while it was read.", hint=_DOWNLOAD_AGAIN
        )
    return data


def _metadata(name: str, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ModelMalformed(f"{name}: __metadata__ does not map names to strings.", hint=_DOWNLOAD_AGAIN)
    if len(value) > MAX_METADATA:
        raise ModelMalformed(
            f"{name}: __metadata__ has {len(value)} entries; {MAX_METADATA} are allowed.", hint=_DOWNLOAD_AGAIN
        )
    return value


def _tensor(path: Path, name: str, entry: object, start: int, size: int) -> TensorInfo:
    where = f"{path.name}: tensor {quoted(name)}"

    def malformed(problem: str) -> ModelMalformed:
        return ModelMalformed(f"{where} {problem}", hint=_DOWNLOAD_AGAIN)

    if not name.isprintable():
        raise malformed("has a name that is not printable text.")
    dtype, shape, offsets = _fields(entry, malformed)
    if dtype in UNREADABLE_DTYPES:
        raise ModelUnsupported(f"{where} is stored as {dtype}.", hint=f"Supported: {', '.join(DTYPE_BYTES)}.")
    if dtype not in DTYPE_BYTES:
        raise malformed(f"has the unknown dtype {quoted(dtype)}.")
    begin, end = offsets
    # The sizes are checked before they are multiplied: multiplying huge integers takes long.
    elements = math.prod(shape) if all(dim <= MAX_ELEMENTS for dim in shape) else MAX_ELEMENTS + 1
    if elements > MAX_ELEMENTS:
        raise malformed(f"has the shape {quoted(shape)}, more elements than 63 bits count.")
    if begin > end:
        raise malformed(f"begins at byte {start + begin}, after its end at byte {start + end}.")
    if start + end > size:
        raise malformed(f"ends at byte {start + end}, beyond the file's {size} bytes.")
    needed = elements * DTYPE_BYTES[dtype]
    if end - begin != needed:
        raise malformed(f"holds {end - begin} bytes, but shape {quoted(shape)} in {dtype} takes {needed}.")
    return TensorInfo(name, tuple(shape), dtype, path, start + begin, needed)


def _fields(entry: object, malformed: Callable[[str], ModelMalformed]) -> tuple[str, list[int], list[int]]:
    """The dtype, shape and data_offsets of a tensor's entry, checked for their types."""
    if not isinstance(entry, dict):
        raise malformed(f"is described by a value of type {type(entry).__name__}, not an object.")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        raise malformed(f"lacks {' and '.join(missing)}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise malformed(f"has the unknown dtype {quoted(dtype)}.")
    if isinstance(shape, list) and len(shape) > MAX_DIMENSIONS:
        raise malformed(f"has {len(shape)} dimensions; {MAX_DIMENSIONS} are allowed.")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise malformed(f"has the shape {quoted(shape)}; sizes are whole numbers from 0.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(o) for o in offsets):  # noqa: PLR2004
        raise malformed(f"has the data_offsets {quoted(offsets)}; they are two whole numbers from 0.")
    return dtype, shape, offsets


def _check_layout(name: str, infos: list[TensorInfo], start: int, size: int) -> None:
    position = start
    previous = "the header"
    for info in infos:
        if info.offset < position:
            raise ModelMalformed(
                f"{name}: tensor {quoted(info.name)} begins at byte {info.offset}, before the end of {previous} at "
                f"byte {position}.",
                hint=_DOWNLOAD_AGAIN,
            )
        if info.offset > position:
            raise ModelMalformed(
                f"{name}: bytes {position} to {info.offset}, between {previous} and tensor {quoted(info.name)}, "
                "belong to no tensor.",
                hint=_DOWNLOAD_AGAIN,
            )
        position = info.offset + info.nbytes
        previous = f"tensor {quoted(info.name)}"
    if position != size:
        raise ModelMalformed(
            f"{name}: {size - position} bytes after {previous} belong to no tensor.", hint=_DOWNLOAD_AGAIN
        )


def _single(path: Path) -> Checkpoint:
    tensors, _ = read_header(path)
    if not tensors:
        raise ModelMalformed(f"{path.name}: the header names no tensor.", hint=_DOWNLOAD_AGAIN)
    return Checkpoint(MappingProxyType(tensors), (path,))


def _sharded(folder: Path) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    files: list[Path] = []
    for shard, names in sorted(_weight_map(folder / INDEX_NAME).items()):
        path = folder / shard
        if not path.is_file():
            raise ModelMalformed(
                f"{path}: the shard is missing; {INDEX_NAME} names {len(names)} tensors in it.",
                hint="Download the missing file.",
            )
        header, _ = read_header(path)
        absent = names - header.keys()
        if absent:
            raise ModelMalformed(
                f"{shard}: tensor {quoted(min(absent))} is not in it, though {INDEX_NAME} says so.",
                hint="Download both files again.",
            )
        tensors |= {name: info for name, info in header.items() if name in names}
        files.append(path)
    return Checkpoint(MappingProxyType(tensors), tuple(files))


def _weight_map(index: Path) -> dict[str, set[str]]:
    """Name of each shard -> names of its tensors."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelMalformed(f"{index.name}: weight_map is not an object naming tensors.", hint=_DOWNLOAD_AGAIN)
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not _is_plain_name(shard):
            raise ModelMalformed(
                f"{index.name}: tensor {quoted(name)} is said to be in {quoted(shard)}, which is not the plain name of "
                "a .safetensors file.",
                hint="Do not use this model: its index points outside its folder or at a file of another kind.",
            )
        shards.setdefault(shard, set()).add(name)
        if len(shards) > MAX_FILES:
            raise ModelMalformed(f"{index.name}: it names more than {MAX_FILES} files.", hint=_DOWNLOAD_AGAIN)
    return shards


def _only_candidate(folder: Path) -> Path:
    """The one weights file of a folder that has neither an index nor ``model.safetensors``."""
    # consolidated*.safetensors repeats the weights under other names (Mistral's and Meta's own layout).
    candidates = [path for path in _listed(folder, ".safetensors") if not path.name.startswith("consolidated")]
    if len(candidates) == 1 and not _SHARD_STEM.search(candidates[0].stem):
        return candidates[0]
    if candidates:
        names = ", ".join(path.name for path in candidates[:4]) + (", …" if len(candidates) > 4 else "")  # noqa: PLR2004
        raise ModelMalformed(
            f"{folder}: {len(candidates)} .safetensors file(s) ({names}) and neither {INDEX_NAME} nor {SINGLE_NAME}, "
            "so nothing says which make the model.",
            hint=f"Download {INDEX_NAME}, or name one file.",
        )
    pickled = next((path for path in _listed(folder) if path.suffix in _PICKLE_SUFFIXES), None)
    if pickled is not None:
        raise ModelUnsupported(
            f"{folder}: the weights are in {pickled.name}; pickle files can run code and are never read.",
            hint="Convert them to safetensors.",
        )
    raise ModelNotFound(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME} in this folder.")


def _listed(folder: Path, suffix: str | None = None) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file() and suffix in (None, path.suffix))


def _is_plain_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and len(name) <= _LONGEST_NAME
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
