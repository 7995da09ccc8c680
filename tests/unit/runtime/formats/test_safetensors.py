"""Safetensors headers and indexes: what is read, and how each kind of damage is refused."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rbee_worker.errors import ModelMalformed, ModelNotFound, ModelUnsupported
from rbee_worker.runtime.formats.checkpoint import DTYPE_BYTES, MAX_TENSORS
from rbee_worker.runtime.formats.safetensors import (
    MAX_DIMENSIONS,
    MAX_FILES,
    MAX_METADATA,
    read_header,
    read_safetensors,
)
from rbee_worker.runtime.untrusted import MAX_JSON_BYTES, MAX_JSON_VALUES


def test_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {
        "model.layers.10.mlp.up_proj.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
        "model.layers.2.mlp.up_proj.weight": np.arange(6, dtype=np.float16).reshape(3, 2),
        "scalar": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 5), dtype=np.uint8),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    checkpoint = read_safetensors(path)
    assert set(checkpoint.tensors) == set(arrays)
    assert checkpoint.files == (path,)
    data = path.read_bytes()
    for name, array in arrays.items():
        info = checkpoint.tensors[name]
        assert info.shape == array.shape
        assert info.nbytes == array.nbytes
        assert data[info.offset : info.offset + info.nbytes] == array.tobytes()
    assert sum(info.parameters for info in checkpoint.tensors.values()) == 12 + 6 + 1 + 0
    assert checkpoint.total_bytes == 48 + 12 + 8
    assert checkpoint.dtypes == {"F32": 48, "F16": 12, "I64": 8, "U8": 0}
    assert list(checkpoint.dtypes) == ["F32", "F16", "I64", "U8"]
    assert read_header(path)[1] == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_reads_every_dtype_of_the_table(tmp_path: Path, files: SimpleNamespace, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(files.safetensors_bytes({"x": (dtype, [2, 3], b"\0" * 6 * DTYPE_BYTES[dtype])}))
    info = read_safetensors(path).tensors["x"]
    assert (info.dtype, info.shape, info.parameters) == (dtype, (2, 3), 6)
    assert info.nbytes == 6 * DTYPE_BYTES[dtype]


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: list[tuple[str, object, int, str]] = [
    # what, header, bytes of data, message after "model.safetensors: "
    ("not JSON", b'{"a":', 0, "the header is not JSON: Expecting value (line 1, column 6)."),
    ("not UTF-8", b'{"\xff":1}', 0, "the header is not UTF-8 (byte 2)."),
    ("a list", b"[]", 0, "the header is not a JSON object but of type list."),
    ("NaN", b'{"x":NaN}', 0, "the header holds NaN, which is not JSON."),
    ("deep", b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "the header is nested too deeply."),
    ("thousands of digits", b'{"x":' + b"9" * 5000 + b"}", 0, "the header holds an integer of 5000 digits; 100 are"),
    ("duplicate keys", b'{"x":1,"y":2,"x":3}', 0, "the header names 'x' twice."),
    ("duplicate fields", b'{"x":{"dtype":"F32","dtype":"F16"}}', 0, "the header names 'dtype' twice."),
    ("no tensors", {}, 0, "the header names no tensor."),
    ("metadata of numbers", {"__metadata__": {"a": 1}}, 0, "__metadata__ does not map names to strings."),
    ("entry is a number", {"x": 5}, 0, "tensor 'x' is described by a value of type int, not an object."),
    ("fields missing", {"x": {"dtype": "F32"}}, 0, "tensor 'x' lacks shape and data_offsets."),
    ("unknown dtype", {"x": entry("F33")}, 8, "tensor 'x' has the unknown dtype 'F33'."),
    ("dtype is a list", {"x": entry(["F32"])}, 8, "tensor 'x' has the unknown dtype ['F32']."),
    ("negative size", {"x": entry(shape=[-2])}, 8, "tensor 'x' has the shape [-2]; sizes are whole numbers from 0."),
    ("fractional size", {"x": entry(shape=[2.0])}, 8, "tensor 'x' has the shape [2.0]; sizes are whole"),
    ("boolean size", {"x": entry(shape=[True])}, 8, "tensor 'x' has the shape [True]; sizes are whole"),
    ("shape is text", {"x": entry(shape="2")}, 8, "tensor 'x' has the shape '2'; sizes are whole"),
    (
        "overflow",
        {"x": entry(shape=[2**40, 2**40])},
        8,
        "tensor 'x' has the shape [1099511627776, 1099511627776], more elements than 63 bits count.",
    ),
    (
        "overflow hidden by a zero",
        {"x": entry(shape=[2**64, 0], offsets=[0, 0])},
        0,
        "tensor 'x' has the shape [18446744073709551616, 0], more elements than 63 bits count.",
    ),
    (
        "nine dimensions",
        {"x": entry(shape=[1] * 9, offsets=[0, 4])},
        4,
        "tensor 'x' has 9 dimensions; 8 are allowed.",
    ),
    (
        "much metadata",
        {"__metadata__": dict.fromkeys(map(str, range(MAX_METADATA + 1)), "")},
        0,
        f"__metadata__ has {MAX_METADATA + 1} entries; {MAX_METADATA} are allowed.",
    ),
    (
        "many tensors",
        dict.fromkeys(map(str, range(MAX_TENSORS + 1)), 0),
        0,
        f"the header names {MAX_TENSORS + 1} tensors; {MAX_TENSORS} are allowed.",
    ),
    (
        "many values",
        b'{"x":{"dtype":"F32","shape":[' + b"1," * MAX_JSON_VALUES + b'1],"data_offsets":[0,4]}}',
        4,
        f"the header holds {MAX_JSON_VALUES + 3} commas; less than {MAX_JSON_VALUES} are allowed,",
    ),
    (
        "a size of thousands of digits",
        b'{"x":{"dtype":"F32","shape":[' + b"9" * 101 + b'],"data_offsets":[0,4]}}',
        4,
        "the header holds an integer of 101 digits; 100 are allowed.",
    ),
    ("one offset", {"x": entry(offsets=[0])}, 8, "tensor 'x' has the data_offsets [0]; they are two whole numbers"),
    ("negative offset", {"x": entry(offsets=[-8, 0])}, 8, "tensor 'x' has the data_offsets [-8, 0]; they are two"),
    ("backwards", {"x": entry(offsets=[8, 0])}, 8, "tensor 'x' begins at byte {8}, after its end at byte {0}."),
    ("beyond the end", {"x": entry(offsets=[0, 9])}, 8, "tensor 'x' ends at byte {9}, beyond the file's {8} bytes."),
    ("truncated", {"x": entry()}, 5, "tensor 'x' ends at byte {8}, beyond the file's {5} bytes."),
    ("too few bytes", {"x": entry(shape=[3])}, 8, "tensor 'x' holds 8 bytes, but shape [3] in F32 takes 12."),
    (
        "overlap",
        {"a": entry(), "b": entry(offsets=[4, 12])},
        12,
        "tensor 'b' begins at byte {4}, before the end of tensor 'a' at byte {8}.",
    ),
    ("hole", {"a": entry(), "b": entry(offsets=[12, 20])}, 20, "bytes {8} to {12}, between tensor 'a' and tensor 'b',"),
    ("hole at the start", {"a": entry(offsets=[4, 12])}, 12, "bytes {0} to {4}, between the header and tensor 'a',"),
    ("trailing bytes", {"a": entry()}, 11, "3 bytes after tensor 'a' belong to no tensor."),
    ("control characters", {"a\x1b[2J": entry()}, 8, r"tensor 'a\x1b[2J' has a name that is not printable text."),
    ("lone surrogate", b'{"\\ud800":{}}', 0, r"tensor '\ud800' has a name that is not printable text."),
]


@pytest.mark.parametrize(("header", "size", "message"), [case[1:] for case in HEADERS], ids=[c[0] for c in HEADERS])
def test_refuses_a_wrong_header(
    tmp_path: Path, files: SimpleNamespace, header: object, size: int, message: str
) -> None:
    raw = files.raw_safetensors(header, b"\0" * size)
    start = len(raw) - size
    for offset in range(21):  # "{8}" in an expected message is that offset counted from the start of the file
        message = message.replace(f"{{{offset}}}", str(start + offset))
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ModelMalformed) as caught:
        read_safetensors(path)
    assert caught.value.message.startswith(f"model.safetensors: {message}")
    assert caught.value.exit_code == 3
    assert caught.value.hint == "Download the file again."


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the file is 0 bytes, shorter than the 8 bytes of a header length."),
        (b"1234567", "the file is 7 bytes, shorter than the 8 bytes of a header length."),
        ((99).to_bytes(8, "little") + b"{}", "the header claims 99 bytes, but only 2 follow its length."),
        (b"\xff" * 8, f"the header claims {2**64 - 1} bytes; {MAX_JSON_BYTES} are allowed."),
        (
            (MAX_JSON_BYTES + 1).to_bytes(8, "little"),
            f"the header claims {MAX_JSON_BYTES + 1} bytes; {MAX_JSON_BYTES} are allowed.",
        ),
    ],
)
def test_refuses_a_wrong_length(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ModelMalformed) as caught:
        read_safetensors(path)
    assert caught.value.message == f"model.safetensors: {message}"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64"])
def test_names_a_dtype_that_is_known_but_not_read(tmp_path: Path, files: SimpleNamespace, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(files.raw_safetensors({"x": entry(dtype)}, b"\0" * 8))
    with pytest.raises(ModelUnsupported) as caught:
        read_safetensors(path)
    assert caught.value.message == f"model.safetensors: tensor 'x' is stored as {dtype}."
    assert caught.value.exit_code == 4


def check_whatever(path: Path) -> None:
    """Either a model that holds together, or one of the two refusals."""
    try:
        checkpoint = read_safetensors(path)
    except (ModelMalformed, ModelUnsupported) as error:
        assert path.name in error.message  # noqa: PT017 (either outcome is right)
        return
    size = path.stat().st_size
    assert sum(info.nbytes for info in checkpoint.tensors.values()) <= size
    for info in checkpoint.tensors.values():
        assert info.nbytes == math.prod(info.shape) * DTYPE_BYTES[info.dtype]
        assert info.offset + info.nbytes <= size


@given(raw=st.binary(max_size=200), framed=st.booleans())
def test_any_bytes_are_read_or_refused(scratch: Path, raw: bytes, *, framed: bool) -> None:
    path = scratch / "any.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw if framed else raw)
    check_whatever(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BYTES, "F4", "?"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@given(header=st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=4), data=st.binary(max_size=40))
def test_any_json_header_is_read_or_refused(
    scratch: Path, files: SimpleNamespace, header: dict[str, Any], data: bytes
) -> None:
    path = scratch / "json.safetensors"
    path.write_bytes(files.raw_safetensors(header, data))
    check_whatever(path)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.none() | st.integers(0, 10_000))
def test_a_damaged_file_is_read_or_refused(
    scratch: Path, files: SimpleNamespace, position: int, value: int, cut: int | None
) -> None:
    tensors = {"a": ("F16", [2, 3], bytes(12)), "b": ("F32", [4], bytes(16)), "c": ("BF16", [], bytes(2))}
    raw = bytearray(files.safetensors_bytes(tensors, {"format": "pt"}))
    raw[position % len(raw)] = value
    path = scratch / "damaged.safetensors"
    path.write_bytes(raw if cut is None else raw[: cut % len(raw)])
    check_whatever(path)
    if cut is not None:
        with pytest.raises((ModelMalformed, ModelUnsupported)):
            read_safetensors(path)


# -- folders


Shards = Callable[..., Path]


@pytest.fixture
def sharded(tmp_path: Path, files: SimpleNamespace) -> Shards:
    """Two shards of one tensor each and an index; ``weight_map`` replaces the index's."""

    def build(weight_map: object = None) -> Path:
        for number, name in enumerate(("a", "b"), 1):
            data = files.safetensors_bytes({name: ("F32", [2], bytes(8)), f"spare.{name}": ("U8", [1], b"\0")})
            (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(data)
        default = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        index = {"metadata": {}, "weight_map": default if weight_map is None else weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return build


def test_the_index_decides(sharded: Shards, files: SimpleNamespace) -> None:
    folder = sharded()
    # The same weights again under other names, and a stray single file: neither is in the index.
    (folder / "consolidated.safetensors").write_bytes(files.safetensors_bytes({"a": ("F32", [2], b"\1" * 8)}))
    (folder / "model.safetensors").write_bytes(b"not read")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.safetensors").write_bytes(b"not read")
    checkpoint = read_safetensors(folder)
    assert sorted(checkpoint.tensors) == ["a", "b"]
    assert [path.name for path in checkpoint.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert checkpoint.tensors["b"].file == checkpoint.files[1]


def test_refuses_a_missing_shard(sharded: Shards) -> None:
    folder = sharded()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ModelMalformed, match=r"model-00002-of-00002\.safetensors: the shard is missing.* names 1 tensors"
    ):
        read_safetensors(folder)


def test_refuses_an_index_that_names_what_its_shard_lacks(sharded: Shards) -> None:
    folder = sharded({"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"})
    with pytest.raises(ModelMalformed, match=r"model-00001-of-00002\.safetensors: tensor 'b' is not in it"):
        read_safetensors(folder)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:x.safetensors",
     "..", ".hidden.safetensors", "pytorch_model.bin", "", "nul\0.safetensors", 3, None],
)  # fmt: skip
def test_refuses_a_shard_that_is_no_plain_name(sharded: Shards, shard: object) -> None:
    folder = sharded({"a": "model-00001-of-00002.safetensors", "b": shard})
    with pytest.raises(ModelMalformed) as caught:
        read_safetensors(folder)
    assert caught.value.message.startswith(
        f"model.safetensors.index.json: tensor 'b' is said to be in {shard!r}, which is not the plain name"
    )
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("weight_map", [[], {}, "x", 5])
def test_refuses_an_index_without_a_weight_map(sharded: Shards, weight_map: object) -> None:
    with pytest.raises(ModelMalformed, match=r"model\.safetensors\.index\.json: weight_map is not an object"):
        read_safetensors(sharded(weight_map))


def test_refuses_an_index_of_endless_files(sharded: Shards) -> None:
    folder = sharded({str(i): f"{i}.safetensors" for i in range(MAX_FILES + 1)})
    with pytest.raises(ModelMalformed, match=rf"model\.safetensors\.index\.json: it names more than {MAX_FILES} files"):
        read_safetensors(folder)


def test_a_tensor_of_as_many_dimensions_as_are_allowed_is_read(tmp_path: Path, files: SimpleNamespace) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(files.safetensors_bytes({"x": ("F32", [1] * MAX_DIMENSIONS, b"\0" * 4)}))
    assert read_safetensors(path).tensors["x"].shape == (1,) * MAX_DIMENSIONS


def test_a_header_of_as_many_tensors_as_are_allowed_is_read(tmp_path: Path, files: SimpleNamespace) -> None:
    header = {f"t{i}": {"dtype": "F32", "shape": [0, 1, 1], "data_offsets": [0, 0]} for i in range(MAX_TENSORS)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(files.raw_safetensors(header, b""))
    assert len(read_safetensors(path).tensors) == MAX_TENSORS


def test_several_files_without_an_index(sharded: Shards, files: SimpleNamespace) -> None:
    folder = sharded()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelMalformed, match=r"2 \.safetensors file\(s\) .*neither model\.safetensors\.index\.json"):
        read_safetensors(folder)
    (folder / "model.safetensors").write_bytes(files.safetensors_bytes({"x": ("U8", [1], b"\0")}))
    assert list(read_safetensors(folder).tensors) == ["x"]


def test_a_lone_file_of_another_name_is_the_model(tmp_path: Path, files: SimpleNamespace) -> None:
    (tmp_path / "weights.safetensors").write_bytes(files.safetensors_bytes({"x": ("U8", [1], b"\0")}))
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    assert list(read_safetensors(tmp_path).tensors) == ["x"]


def test_one_shard_is_not_a_model(sharded: Shards) -> None:
    folder = sharded()
    shard = folder / "model-00001-of-00002.safetensors"
    with pytest.raises(ModelMalformed, match="is one shard of a model") as caught:
        read_safetensors(shard)
    assert caught.value.hint == f"Name the folder: {folder}"
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelMalformed, match=r"1 \.safetensors file\(s\)"):
        read_safetensors(folder)


def test_pickle_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(
        ModelUnsupported, match=r"pytorch_model\.bin; pickle files can run code and are never"
    ) as caught:
        read_safetensors(tmp_path)
    assert caught.value.exit_code == 4
    assert caught.value.hint == "Convert them to safetensors."


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        read_safetensors(tmp_path)
    with pytest.raises(ModelNotFound, match="gone: no such file or folder"):
        read_safetensors(tmp_path / "gone")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelMalformed, match=rf"^{re.escape(str(tmp_path))}: cannot be read: Is a directory\.$"):
        read_header(tmp_path)
