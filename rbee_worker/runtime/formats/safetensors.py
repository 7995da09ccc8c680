"""What a checkpoint holds and where: safetensors headers, read without torch and without touching the weights.

A safetensors file is an 8-byte little-endian header length, that many bytes of JSON mapping each tensor's name to its
dtype, shape and ``data_offsets`` (begin and end, counted from the end of the header), then the data. Every file here
is untrusted: a header is checked in full before anything is allocated for it. Format:
https://github.com/huggingface/safetensors#format
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rbee_worker.errors import ModelMalformed, ModelNotFound, ModelUnsupported

MAX_HEADER_BYTES = 2**25
"""Bytes of a header, and of an index file. The format allows 100 MB; an index of 281,000 tensors, those of 384 experts
in 61 layers in four parts each, takes 28 MB."""

MAX_JSON_VALUES = 2**20
"""Values in a piece of JSON. Python's parser lets no other thread run while it works, and a million values take it
half a second. As many tensors as a header may name, each with its three fields, are fewer."""

MAX_TENSORS = 2**17
"""Tensors in one file: 131,072. The largest models have more, in dozens of files."""

MAX_DIMENSIONS = 8
"""Dimensions of a tensor. The format names no limit; weights have two, and five at most (convolutions of video)."""

MAX_METADATA = 2**12
"""Entries of ``__metadata__``; usual are one to a hundred."""

MAX_FILES = 10_000
"""Files that an index may name; the largest models have some hundred."""

MAX_ELEMENTS = 2**63 - 1

_MAX_DIGITS = 100
"""Digits of an integer in JSON: the time to read one grows with the square of them. Known files have up to 31."""

_SHOWN = 120

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
        "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    }
)  # fmt: skip
"""Bytes per element of the safetensors dtypes that this worker reads."""

UNREADABLE_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"})
"""Dtypes of the format that no supported model stores its weights in; the F4 and F6 ones pack several in a byte."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TEMPLATES_FOLDER = "additional_chat_templates"
"""Where a model's folder has chat templates beside its default one."""

_DOWNLOAD_AGAIN = "Download the file again."
_SHARD_STEM = re.compile(r"-\d{5}-of-\d{5}$")
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor.

    Attributes:
        name: Hugging Face name, such as ``model.layers.0.mlp.up_proj.weight`` (names in GGUF files are mapped).
        shape: in Hugging Face order: rows, the output features, first.
        dtype: as stored: ``F32``, ``BF16``, ``I8``… or a GGUF type such as ``Q4_1``.
        file, offset, nbytes: where it is stored: from which byte of which file on, and in how many.
        rope_heads: heads whose rows are permuted for ggml's interleaved rotary embedding (GGUF only); 0: none.
        shift: what is to be added to every value (GGUF only).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int
    rope_heads: int = 0
    shift: float = 0.0

    @property
    def parameters(self) -> int:
        """Elements: the product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A read-only view of the tensors of one model.

    Attributes:
        tensors: by name, in the order of the files and of the offsets in them.
        files: that hold the tensors.
    """

    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(info.parameters for info in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Stored bytes of each dtype, the largest first."""
        counts: dict[str, int] = {}
        for info in self.tensors.values():
            counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def quoted(text: object) -> str:
    """Untrusted text for a message: control characters escaped, cut at 120 characters."""
    # Of what may be megabytes only the beginning is spelled out.
    shown = repr(text[: _SHOWN + 1] if isinstance(text, str | bytes | list | tuple) else text)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


def parse_json_object(
    data: bytes, *, what: str, hint: str = _DOWNLOAD_AGAIN, most_values: int = MAX_JSON_VALUES
) -> dict[str, Any]:
    """Parse one JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, no endless integers.

    Args:
        data: the text.
        what: how a message names it, such as ``config.json`` or ``model.safetensors: the header``.
        hint: of the errors.
        most_values: that it may hold. Commas are counted before it is parsed, those inside of texts too.

    Raises:
        ModelMalformed: it is not that.
    """
    _check_values(data, most_values, what, hint)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ModelMalformed(f"{what} names {quoted(twice)} twice.", hint=hint)
        return result

    def constant(name: str) -> Any:
        raise ModelMalformed(f"{what} holds {name}, which is not JSON.", hint=hint)

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ModelMalformed(
                f"{what} holds an integer of {len(digits)} digits; {_MAX_DIGITS} are allowed.", hint=hint
            )
        return int(digits)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_int=integer)
    except UnicodeDecodeError as error:
        raise ModelMalformed(f"{what} is not UTF-8 (byte {error.start}).", hint=hint) from error
    except json.JSONDecodeError as error:
        raise ModelMalformed(
            f"{what} is not JSON: {error.msg} (line {error.lineno}, column {error.colno}).", hint=hint
        ) from error
    except RecursionError as error:
        raise ModelMalformed(f"{what} is nested too deeply.", hint=hint) from error
    if not isinstance(value, dict):
        raise ModelMalformed(f"{what} is not a JSON object but of type {type(value).__name__}.", hint=hint)
    return value


def _check_values(data: bytes, most: int, what: str, hint: str) -> None:
    commas = data.count(b",")  # there is one between any two values
    if commas >= most:
        raise ModelMalformed(
            f"{what} holds {commas} commas; less than {most} are allowed, for each parts two values.", hint=hint
        )


def read_json_object(path: Path, *, limit: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """Read one JSON object from a file of at most ``limit`` bytes.

    Raises:
        ModelNotFound: no such file.
        ModelMalformed: unreadable, too large, or not a JSON object.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path}: no such file.") from error
    except OSError as error:
        raise ModelMalformed(f"{path}: cannot be read: {error.strerror or error}.") from error
    if len(data) > limit:
        raise ModelMalformed(f"{path.name} is larger than {limit} bytes, too large for what it should hold.")
    return parse_json_object(data, what=path.name)


def read_safetensors(folder_or_file: Path) -> Checkpoint:
    """Read the headers of a model: one file, or a folder with ``model.safetensors`` or an index of shards.

    The index decides when there is one: files and tensors that it does not name are ignored.

    Raises:
        ModelNotFound: no such file or folder, or a folder without weights.
        ModelMalformed: a header, or the index, is damaged or hostile, or a shard is missing.
        ModelUnsupported: pickle files only, or a dtype that is not read.
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
        ModelMalformed: the file is truncated or its header wrong in any way.
        ModelUnsupported: a dtype that is not read.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
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
    if length > MAX_HEADER_BYTES:
        raise ModelMalformed(
            f"{name}: the header claims {length} bytes; {MAX_HEADER_BYTES} are allowed.", hint=_DOWNLOAD_AGAIN
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
    # Each size before their product: the work of multiplying grows with the digits.
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
    """The three fields of a tensor's entry, each of its right type."""
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
    """Tensor names by shard."""
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
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
