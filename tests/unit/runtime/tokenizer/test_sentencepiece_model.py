"""SentencePiece files are read whole or refused, whatever bytes they hold."""

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.runtime.tokenizer.sentencepiece import MAX_PIECE_LENGTH, build_sentencepiece
from rbee_worker.runtime.tokenizer.sentencepiece_model import (
    Piece,
    PieceType,
    SentencePieceModel,
    is_sentencepiece,
    read_sentencepiece,
)


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, value: float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(text: str, score: float = 0.0, kind: int = 1) -> bytes:
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


START = piece("<unk>", 0.0, 2) + piece("<s>", 0.0, 3) + piece("</s>", 0.0, 3)
LETTERS = START + piece("▁", -1.0) + piece("a", -2.0) + piece("b", -3.0) + piece("ab", -1.5) + piece("▁ab", -1.2)


def spec(**values: Any) -> bytes:
    numbers = {"model_type": 3, "suffix": 24, "byte_fallback": 35, "bos": 41, "eos": 42}
    return field(2, b"".join(field(numbers[name], value) for name, value in values.items()))


def test_reads_what_a_tokenizer_needs() -> None:
    data = LETTERS + spec(model_type=2, byte_fallback=0, bos=1, eos=-1) + field(3, field(3, 0) + field(4, 0))
    # Fields that are not needed, of every wire type, are skipped.
    data += field(4, b"self test") + varint(99 << 3 | 1) + b"12345678" + field(98, 1.0)
    assert is_sentencepiece(data)
    model = read_sentencepiece(data)
    assert model.pieces[0] == Piece("<unk>", 0.0, PieceType.UNKNOWN)
    assert [p.text for p in model.pieces[3:]] == ["▁", "a", "b", "ab", "▁ab"]
    assert (model.algorithm, model.unknown_id, model.bos_id) == ("bpe", 0, 1)
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces, model.escape_whitespaces) == (False, False, True)
    tokenizer = build_sentencepiece(model)
    assert tokenizer.encode("abab ab").tokens == ["ab", "ab", "▁ab"]
    assert tokenizer.decode(tokenizer.encode("abab ab").ids) == "abab ab"


@pytest.mark.parametrize(("bos", "found"), [(1, 1), (2, 2), (-1, None), (3, None), (8, None)])
def test_the_beginning_is_a_control_piece_or_none(bos: int, found: int | None) -> None:
    assert read_sentencepiece(LETTERS + spec(model_type=2, bos=bos)).bos_id == found


def test_blanks_that_are_not_escaped() -> None:
    pieces = START + piece(" ", -1.0) + piece("a", -2.0) + piece(" a", -1.2)
    unescaped = field(3, field(3, 1) + field(4, 0) + field(5, 0))
    assert build_sentencepiece(read_sentencepiece(pieces + spec(model_type=2) + unescaped)).encode("a a").tokens == [
        " a",
        " a",
    ]


def test_defaults_are_those_of_the_schema() -> None:
    model = read_sentencepiece(LETTERS)
    assert (model.algorithm, model.byte_fallback, model.bos_id) == ("unigram", False, 1)
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces) == (True, True)
    assert build_sentencepiece(model).encode(" ab ").tokens == ["▁ab"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no pieces"),
        (b"\x0a", "it ends in the middle of a number"),
        (b"\x0a\x05ab", "a field of 5 bytes at byte 2 runs past the end"),
        (b"\x0b", "wire type 3"),
        (b"\xff" * 11, "a number of more than 10 bytes"),
        (field(1, 3), "a number where bytes belong"),
        (field(1, field(1, b"\xff")), "a piece is not UTF-8"),
        (piece("a", float("nan")), "a score is not finite"),
        (piece("a", 0.0, 9), "a piece of an unknown type"),
        (piece("a"), "0 pieces are the unknown one"),
        (START + piece("x", 0.0, 2), "2 pieces are the unknown one"),
        (LETTERS + field(3, field(2, 7)), "the normaliser's rules are no bytes"),
    ],
)
def test_what_is_no_model_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ModelMalformed, match=f"^tokenizer.model is no SentencePiece model: {message}"):
        read_sentencepiece(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LETTERS + spec(model_type=3), "the SentencePiece algorithm is word; supported: unigram, bpe"),
        (LETTERS + spec(model_type=4), "the SentencePiece algorithm is char"),
        (LETTERS + spec(suffix=1), "treat_whitespace_as_suffix is set"),
    ],
)
def test_what_is_not_supported_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"tokenizer.model: {message}"):
        read_sentencepiece(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LETTERS + piece("a"), "holds the piece 'a' twice"),
        (LETTERS + piece(""), "holds an empty piece"),
        (LETTERS + piece("x" * (MAX_PIECE_LENGTH + 1)), f"holds a piece of {MAX_PIECE_LENGTH + 1} characters"),
        (LETTERS + spec(byte_fallback=1), "lacks 256 of them, <0x00> for one"),
        (LETTERS + field(3, field(2, b"\x08\0\0\0junk")), "the rules of its normaliser .* are damaged"),
    ],
)
def test_inconsistent_vocabularies_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ModelMalformed, match=f"tokenizer.model.*{message}"):
        build_sentencepiece(read_sentencepiece(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_model_or_one_error(data: bytes) -> None:
    survive(data)


@given(st.data())
def test_any_damage_to_a_model_is_survived(data: st.DataObject) -> None:
    good = bytearray(LETTERS + spec(model_type=2) + field(3, field(2, b"")))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    survive(bytes(good[: data.draw(st.integers(0, len(good)))]))


def survive(data: bytes) -> None:
    try:
        model = read_sentencepiece(data)
        build_sentencepiece(model).encode("ab ba")
    except (ModelMalformed, ModelUnsupported):
        return
    assert isinstance(model, SentencePieceModel)


def test_pieces_that_are_not_text_never_come_out_of_merges() -> None:
    data = LETTERS + piece("<", -4.0) + piece("s>", -5.0) + piece("s", -6.0) + piece(">", -7.0) + spec(model_type=2)
    tokenizer = build_sentencepiece(read_sentencepiece(data))
    assert tokenizer.encode("<s>").tokens == ["<s>"]
    assert tokenizer.encode("< s>").tokens == ["▁", "<", "▁", "s>"]
    assert ("<", "s>") not in [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
