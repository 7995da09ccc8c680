"""The header of a GGUF file: the metadata, and where each tensor lies.

The header is untrusted. Every length is checked against the file's size before it is used, so a false one can cause
neither a long loop nor a large allocation. The ``gguf`` package's own reader is not used: it makes an array of every
string (3 s for a vocabulary of 50,000, 0.1 s here), and it does not end on an array that claims 2^60 elements.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from rbee_worker.errors import ModelMalformed, ModelNotFound, ModelUnsupported
from rbee_worker.escape import quoted
from rbee_worker.runtime.files import open_file
from rbee_worker.runtime.formats.checkpoint import MAX_ELEMENTS, MAX_TENSORS

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_SWAPPED_VERSIONS: Final = tuple(int.from_bytes(version.to_bytes(4, "little"), "big") for version in _VERSIONS)
_DEFAULT_ALIGNMENT: Final = 32
_MAX_ALIGNMENT: Final = 2**20
_MAX_DIMENSIONS: Final = 4
_STRING: Final = 8
_ARRAY: Final = 9
_LENGTH_BYTES: Final = 8
"""Bytes of a string's length field: the size of an empty string."""

_MAX_HEADER_BYTES: Final = 2**26
"""Bytes of a header: four times what the largest vocabularies take with their merges."""

_MAX_PAIRS: Final = 2**12
"""Pairs of metadata. Usual files have 20 to 60."""

MAX_ELEMENTS_OF_ARRAYS: Final = 2**23
"""Elements of all arrays of a header together: several times the largest vocabulary with its merges. The file's size
is not limit enough: a number may take one byte in the file, and it takes eight or more in memory."""

_SCALARS: Final[Mapping[int, str]] = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
)
_DOWNLOAD_AGAIN: Final = "Download the file again."


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor as GGUF names it.

    Attributes:
        name: ggml's name, such as ``blk.0.attn_q.weight``.
        shape: rows first. GGUF itself stores the sizes in the opposite order.
        type: ggml's type of its elements.
        offset: its first byte in the file.
        nbytes: its size in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """A whole header.

    Attributes:
        metadata: values by key, such as ``llama.block_count``; arrays are lists.
        tensors: in the order of their offsets.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file.

    Raises:
        ModelNotFound: no such file.
        ModelMalformed: it cannot be read, is truncated or not a GGUF file, or its header is inconsistent.
        ModelUnsupported: a version, byte order or tensor type that is not read, or one part of a split model.
    """
    try:
        with open_file(path) as stream:
            return _Parser(path, stream, os.fstat(stream.fileno()).st_size).header()
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path}: no such file.") from error
    except OSError as error:
        raise ModelMalformed(f"{path}: cannot be read: {error.strerror or error}.") from error


def special_token(fields: Mapping[str, Any], role: str, *, file: str) -> tuple[int, str] | None:
    """The id and text of a special token.

    Args:
        fields: the metadata.
        role: part of the metadata key: ``bos``, ``eos``, ``eot``, ``eom``, ``unknown`` or ``padding``.
        file: the file's name for messages.

    Returns:
        None where the metadata has no such token.

    Raises:
        ModelMalformed: the id is outside the vocabulary.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    index = fields.get(key)
    if index is None:
        return None
    tokens = strings(fields, "tokenizer.ggml.tokens", file)
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ModelMalformed(f"{file}: {key} is {quoted(index)}; the vocabulary has {len(tokens)} tokens.")
    return index, tokens[index]


def strings(fields: Mapping[str, Any], key: str, file: str) -> list[str]:
    """A list of strings from the metadata. Only the type of the first element is checked: arrays have one type.

    Raises:
        ModelMalformed: the key is missing, or its value is not a list of strings or an empty one.
    """
    value = fields.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ModelMalformed(f"{file}: {key} is missing or not a list of strings.", hint=_DOWNLOAD_AGAIN)
    return value


class _Parser:
    """Reads the header once, from its first byte to the start of the data."""

    def __init__(self, path: Path, stream: io.BufferedReader, size: int) -> None:
        self.name = path.name
        self.stream = stream
        self.size = size
        self.position = 0
        self.elements = 0

    def malformed(self, problem: str) -> ModelMalformed:
        return ModelMalformed(f"{self.name}: {problem}", hint=_DOWNLOAD_AGAIN)

    def check_room(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            raise self.malformed(
                f"{what} at byte {self.position} takes {count} bytes, beyond the file's {self.size} bytes."
            )

    def read(self, count: int, what: str) -> bytes:
        self.check_room(count, what)
        if self.position + count > _MAX_HEADER_BYTES:
            raise self.malformed(f"{what} at byte {self.position} takes the header past {_MAX_HEADER_BYTES} bytes.")
        data = self.stream.read(count)
        if len(data) != count:
            raise self.malformed(f"{what} at byte {self.position} ended after {len(data)} of {count} bytes.")
        self.position += count
        return data

    def u32(self, what: str) -> int:
        return int.from_bytes(self.read(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.read(8, what), "little")

    def string(self, what: str) -> str:
        data = self.read(self.u64(what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.malformed(f"{what} is not UTF-8 (byte {self.position - len(data) + error.start}).") from error

    def header(self) -> GGUFHeader:
        self._version()
        tensor_count, pair_count = self.u64("the tensor count"), self.u64("the metadata count")
        for count, most, what in ((tensor_count, MAX_TENSORS, "tensors"), (pair_count, _MAX_PAIRS, "metadata pairs")):
            if count > most:
                raise self.malformed(f"the header claims {count} {what}; {most} are allowed.")
        metadata: dict[str, Any] = {}
        for index in range(pair_count):
            key = self.string(f"metadata key {index} of {pair_count}")
            if key in metadata:
                raise self.malformed(f"metadata key {quoted(key)} occurs twice.")
            metadata[key] = self._value(self.u32(f"the type of {quoted(key)}"), f"metadata {quoted(key)}")
        parts = metadata.get("split.count", 1)
        if parts != 1:
            raise ModelUnsupported(
                f"{self.name} is one of {quoted(parts)} files of a split model.",
                hint="Merge them with llama.cpp's llama-gguf-split --merge.",
            )
        raw = [self._tensor_info(index, tensor_count) for index in range(tensor_count)]
        start = self._data_start(metadata)
        tensors = sorted((self._tensor(start, *info) for info in raw), key=lambda t: (t.offset, t.offset + t.nbytes))
        self._check_tensors(tensors)
        return GGUFHeader(MappingProxyType(metadata), tuple(tensors))

    def _version(self) -> None:
        magic = self.read(4, "the magic")
        if magic != _MAGIC:
            raise self.malformed(f"begins with {quoted(magic)}, not {quoted(_MAGIC)}: no GGUF file.")
        version = self.u32("the version")
        if version in _SWAPPED_VERSIONS:
            raise ModelUnsupported(f"{self.name} is a big-endian GGUF file.", hint="Use a little-endian one.")
        if version not in _VERSIONS:
            raise ModelUnsupported(f"{self.name} is GGUF version {version}; versions 2 and 3 are read.")

    def _value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            form = _SCALARS[kind]
            return struct.unpack(form, self.read(struct.calcsize(form), what))[0]
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.malformed(f"{what} has the unknown type {kind}.")
        item, count = self.u32(what), self.u64(what)
        if item != _STRING and item not in _SCALARS:
            raise self.malformed(f"{what} is an array of the type {item}; arrays of numbers and strings are read.")
        width = _LENGTH_BYTES if item == _STRING else struct.calcsize(_SCALARS[item])
        self.check_room(count * width, what)
        self.elements += count
        if self.elements > MAX_ELEMENTS_OF_ARRAYS:
            raise self.malformed(f"{what} takes the arrays past {MAX_ELEMENTS_OF_ARRAYS} elements.")
        if item == _STRING:
            return [self.string(what) for _ in range(count)]
        data = self.read(count * width, what)
        return list(struct.unpack(f"<{count}{_SCALARS[item][1]}", data))

    def _tensor_info(self, index: int, count: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string(f"the name of tensor {index} of {count}")
        where = f"tensor {quoted(name)}"
        dimensions = self.u32(where)
        if dimensions > _MAX_DIMENSIONS:
            raise self.malformed(f"{where} has {dimensions} dimensions; {_MAX_DIMENSIONS} are allowed.")
        shape = tuple(self.u64(where) for _ in range(dimensions))[::-1]
        return name, shape, self.u32(where), self.u64(where)

    def _data_start(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.malformed(f"general.alignment is {quoted(alignment)}, not a power of two.")
        return -(-self.position // alignment) * alignment

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        where = f"tensor {quoted(name)}"
        try:
            ggml_type = GGMLQuantizationType(kind)
        except ValueError as error:
            raise ModelUnsupported(f"{self.name}: {where} is stored as the unknown ggml type {kind}.") from error
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        elements = math.prod(shape)
        if elements == 0 or elements > MAX_ELEMENTS:
            raise self.malformed(f"{where} has the shape {shape}.")
        if (shape[-1] if shape else 1) % block:
            raise self.malformed(
                f"{where} has rows of {shape[-1] if shape else 1} elements, not a multiple of {ggml_type.name}'s "
                f"blocks of {block}."
            )
        nbytes = elements // block * block_bytes
        if start + offset + nbytes > self.size:
            raise self.malformed(
                f"{where} ends at byte {start + offset + nbytes}, beyond the file's {self.size} bytes."
            )
        return GGUFTensor(name, shape, ggml_type, start + offset, nbytes)

    def _check_tensors(self, tensors: list[GGUFTensor]) -> None:
        names: set[str] = set()
        end = 0
        for tensor in tensors:
            if tensor.name in names:
                raise self.malformed(f"tensor {quoted(tensor.name)} occurs twice.")
            names.add(tensor.name)
            if tensor.offset < end:
                raise self.malformed(
                    f"tensor {quoted(tensor.name)} begins at byte {tensor.offset}, inside the tensor that ends at "
                    f"byte {end}."
                )
            end = tensor.offset + tensor.nbytes
