"""Headers of GGUF files: what is read, and how each kind of damage is refused."""

import re
import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.errors import ModelMalformed, ModelNotFound, ModelUnsupported
from rbee_worker.runtime.formats.gguf.families import ARCHITECTURES
from rbee_worker.runtime.formats.gguf.header import read_header
from rbee_worker.runtime.formats.gguf.model import read_gguf
from rbee_worker.runtime.tokenizer.gguf import read_tokenizer, tokenizer_config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def test_header_agrees_with_the_gguf_package(path: Path, files: SimpleNamespace) -> None:
    files.write_gguf(path, metadata={"general.name": "naïve", "general.tags": ["a", ""], "x.floats": [0.5, 1.5]})
    reader = gguf.GGUFReader(path)
    header = read_header(path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(header.metadata) == expected
    assert [tensor.name for tensor in header.tensors] == [tensor.name for tensor in reader.tensors]
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (ours.offset, ours.nbytes, ours.type) == (theirs.data_offset, theirs.n_bytes, theirs.tensor_type)
        assert ours.shape == tuple(theirs.shape.tolist()[::-1])


def test_every_scalar_type_is_read(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.25)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", val=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    values = dict(read_header(path).metadata)
    values.pop("general.architecture")
    assert values == {
        "u8": 200, "i8": -100, "u16": 60_000, "i16": -30_000, "u32": 4_000_000_000, "i32": -2_000_000_000,
        "u64": 2**63, "i64": -(2**62), "f32": 0.25, "f64": 0.1, "yes": True,
    }  # fmt: skip


def header_bytes(
    *, pairs: bytes = b"", pair_count: int = 0, tensors: bytes = b"", count: int = 0, version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, pair_count) + pairs + tensors


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def pair(key: bytes, kind: int, value: bytes = b"") -> bytes:
    return header_bytes(pair_count=1, pairs=text(key) + struct.pack("<I", kind) + value)


def one(shape: tuple[int, ...], kind: int = 0) -> bytes:
    return header_bytes(count=1, tensors=tensor(b"t", shape, kind, 0))


def two(name: bytes, offset: int) -> bytes:
    tensors = tensor(b"t", (4,), 0, 0) + tensor(name, (4,), 0, offset)
    return header_bytes(count=2, tensors=tensors) + b"\0" * 128


ONE = text(b"k") + struct.pack("<I", 4) + b"\1\0\0\0"

END = "beyond the file's"

BROKEN = [
    ("empty", b"", f"the magic at byte 0 takes 4 bytes, {END} 0 bytes."),
    ("magic", b"GGML" + b"\0" * 20, "begins with b'GGML', not b'GGUF': no GGUF file."),
    ("counts cut", header_bytes()[:17], f"the metadata count at byte 16 takes 8 bytes, {END} 17 bytes."),
    ("pairs missing", header_bytes(pair_count=9), f"metadata key 0 of 9 at byte 24 takes 8 bytes, {END} 24 bytes."),
    ("endless pairs", header_bytes(pair_count=4097), "the header claims 4097 metadata pairs; 4096 are allowed."),
    ("endless tensors", header_bytes(count=2**60), f"the header claims {2**60} tensors; 131072 are allowed."),
    (
        "key too long",
        header_bytes(pair_count=1, pairs=struct.pack("<Q", 2**63)),
        f"metadata key 0 of 1 at byte 32 takes {2**63} bytes, {END} 32 bytes.",
    ),
    ("key not UTF-8", header_bytes(pair_count=1, pairs=text(b"a\xff")), "metadata key 0 of 1 is not UTF-8 (byte 33)."),
    ("key twice", header_bytes(pair_count=2, pairs=ONE + ONE), "metadata key 'k' occurs twice."),
    ("unknown type", pair(b"k", 13), "metadata 'k' has the unknown type 13."),
    ("huge array", pair(b"k", 9, struct.pack("<IQ", 0, 2**60)), f"metadata 'k' at byte 49 takes {2**60} bytes, {END}"),
    (
        "huge strings",
        pair(b"k", 9, struct.pack("<IQ", 8, 2**60)),
        f"metadata 'k' at byte 49 takes {2**63} bytes, {END}",
    ),
    ("nested array", pair(b"k", 9, struct.pack("<IQ", 9, 1)), "metadata 'k' is an array of the type 9;"),
    ("alignment", pair(b"general.alignment", 4, struct.pack("<I", 48)), "general.alignment is 48, not a power of two."),
    ("dimensions", one((1,) * 5), "tensor 't' has 5 dimensions; 4 are allowed."),
    ("tensors missing", header_bytes(count=9), f"the name of tensor 0 of 9 at byte 24 takes 8 bytes, {END} 24 bytes."),
    ("overflow", one((2**40, 2**40)), f"tensor 't' has the shape ({2**40}, {2**40})."),
    ("no elements", one((0, 4)), "tensor 't' has the shape (0, 4)."),
    ("ragged blocks", one((4, 40), 8), "tensor 't' has rows of 40 elements, not a multiple of Q8_0's blocks of 32."),
    ("data missing", one((4,)), f"tensor 't' ends at byte 80, {END} 57 bytes."),
    ("twice", two(b"t", 32), "tensor 't' occurs twice."),
    ("overlap", two(b"u", 8), "tensor 'u' begins at byte 104, inside the tensor that ends at byte 112."),
]


@pytest.mark.parametrize(("raw", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_refuses_a_broken_header(path: Path, raw: bytes, message: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(ModelMalformed) as caught:
        read_gguf(path)
    assert caught.value.message.startswith(f"tiny.gguf: {message}")
    assert caught.value.exit_code == 3
    assert caught.value.hint == "Download the file again."


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (header_bytes(version=1), "tiny.gguf is GGUF version 1; versions 2 and 3 are read."),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "tiny.gguf is a big-endian GGUF file."),
        (one((4,), 99), "tiny.gguf: tensor 't' is stored as the unknown ggml type 99."),
        (pair(b"split.count", 2, b"\3\0"), "tiny.gguf is one of 3 files of a split model."),
        (
            header_bytes(),
            f"tiny.gguf: the architecture is None; supported in GGUF files: {', '.join(ARCHITECTURES)}.",
        ),
    ],
)
def test_names_what_is_not_supported(path: Path, raw: bytes, message: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(ModelUnsupported) as caught:
        read_gguf(path)
    assert caught.value.message == message
    assert caught.value.exit_code == 4


def test_arrays_that_would_take_many_times_their_bytes_are_refused(path: Path) -> None:
    key = b"x.y"
    array = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, 2**24)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
        file.truncate(2**25)
    with pytest.raises(ModelMalformed, match="past 8388608 elements"):
        read_header(path)


def test_strings_beyond_the_end_are_refused_before_one_is_read(path: Path) -> None:
    data = pair(b"k", 9, struct.pack("<IQ", 8, 1001)) + b"\0" * 8000
    path.write_bytes(data)
    with pytest.raises(ModelMalformed, match="metadata 'k' at byte 49 takes 8008 bytes, beyond the file's 8049 bytes"):
        read_header(path)


def test_a_header_longer_than_is_allowed_is_refused(path: Path) -> None:
    with path.open("wb") as file:
        file.write(pair(b"k", 8, struct.pack("<Q", 2**26)))
        file.truncate(2**27)
    with pytest.raises(ModelMalformed, match="metadata 'k' at byte 45 takes the header past 67108864 bytes"):
        read_header(path)


def test_missing_file(path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"tiny\.gguf: no such file"):
        read_gguf(path)


def consume(path: Path) -> None:
    """Everything that the header is asked for."""
    try:
        model = read_gguf(path)
        model.config()
        model.generation_config()
        tokenizer_config(model)
        read_tokenizer(model)
    except (ModelMalformed, ModelUnsupported) as error:
        assert path.name in error.message  # noqa: PT017 (either outcome is right)
    else:
        assert all(info.offset + info.nbytes <= path.stat().st_size for info in model.checkpoint.tensors.values())


@given(raw=st.binary(max_size=200), framed=st.booleans())
def test_any_bytes_are_read_or_refused(scratch: Path, raw: bytes, *, framed: bool) -> None:
    path = scratch / "any.gguf"
    path.write_bytes(header_bytes(pair_count=1, count=1) + raw if framed else raw)
    consume(path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, files: SimpleNamespace) -> bytes:
    vocabulary = files.bpe_vocabulary()
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    files.write_gguf(
        path, vocabulary=vocabulary, tensors=files.llama_tensors(8), metadata={"llama.rope.scale_linear": 2.0}
    )
    return path.read_bytes()


@given(position=st.integers(0, 12_000), value=st.integers(0, 255), cut=st.none() | st.integers(0, 12_000))
def test_a_damaged_file_is_read_or_refused(
    scratch: Path, whole: bytes, position: int, value: int, cut: int | None
) -> None:
    raw = bytearray(whole)
    raw[position] = value
    path = scratch / "damaged.gguf"
    path.write_bytes(raw if cut is None else raw[:cut])
    consume(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelMalformed, match=rf"^{re.escape(str(tmp_path))}: cannot be read: Is a directory\.$"):
        read_header(tmp_path)
