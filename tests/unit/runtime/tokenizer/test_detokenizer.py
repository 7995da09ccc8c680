"""Ids become bytes and text by the way the vocabulary spells them; unknown spellings are the library's business."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from rbee_worker.runtime.tokenizer.detokenizer import Decoding, Spelling, read_spelling

REPLACE = decoders.Replace("▁", " ")
LLAMA = decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
GEMMA = decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse()])

PIECES = ["<unk>", "<s>", "▁", "▁a", "b▁", "▁▁", "é", "\ufffd", "<0xG0>", "😀", "##c"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def backend(decoder: Any) -> Tokenizer:
    vocab = {piece: i for i, piece in enumerate([*PIECES, *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))  # noqa: S106
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens([AddedToken("<tool▁x>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize(
    ("decoder", "spelling"),
    [
        (decoders.ByteLevel(), Spelling("byte_level")),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), Spelling("byte_level")),
        (LLAMA, Spelling("pieces", byte_pieces=True, leading="space")),
        (GEMMA, Spelling("pieces", byte_pieces=True)),
        (decoders.Sequence([REPLACE]), Spelling("pieces")),
        (REPLACE, Spelling("pieces")),
        (decoders.Metaspace(), Spelling("pieces", leading="token")),
        (decoders.Metaspace(prepend_scheme="never"), Spelling("pieces")),
        (decoders.Metaspace(replacement="_"), None),
        (decoders.Replace("_", " "), None),
        (decoders.WordPiece(), None),
        (decoders.BPEDecoder(), None),
        (decoders.Sequence([REPLACE, decoders.Strip(" ", 1, 0), decoders.Fuse()]), None),
        (decoders.Sequence([REPLACE, decoders.Fuse(), decoders.Strip(" ", 0, 1)]), None),
        (decoders.Sequence([]), None),
        (None, None),
    ],
)
def test_spellings(decoder: Any, spelling: Spelling | None) -> None:
    assert read_spelling(backend(decoder)) == spelling


@pytest.mark.parametrize("decoder", [LLAMA, GEMMA, decoders.Metaspace(), REPLACE, decoders.WordPiece(), None])
@given(ids=st.lists(st.integers(0, len(PIECES)), max_size=12), skip=st.booleans())
def test_text_is_the_librarys_and_comes_in_pieces_too(decoder: Any, ids: list[int], skip: bool) -> None:
    tokenizer = backend(decoder)
    decoding = Decoding(tokenizer)
    ids = [i if i < len(PIECES) else tokenizer.token_to_id("<tool▁x>") for i in ids]
    text = decoding.decode(ids, skip_special_tokens=skip)
    if decoder is not None:  # without one the library puts blanks between tokens
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    stream = decoding.stream([], skip_special_tokens=skip)
    streamed = "".join([stream.push(i) for i in ids]) + stream.flush()
    assert streamed == text or read_spelling(tokenizer) is None


def ids_of(data: bytes) -> list[int]:
    return [len(PIECES) + byte for byte in data]


def test_bytes_that_are_no_text_spoil_nothing_around_them() -> None:
    decoding = Decoding(backend(GEMMA))
    ids = ids_of("é".encode() + b"\xff" + "😀".encode() + b"\xf0\x9f")
    assert decoding.decode(ids, skip_special_tokens=True) == "é\ufffd😀\ufffd"
    stream = decoding.stream([], skip_special_tokens=True)
    assert [stream.push(i) for i in ids] == ["", "é", "\ufffd", "", "", "", "😀", "", ""]
    assert stream.flush() == "\ufffd"


def test_the_space_before_a_text_goes_only_where_it_begins() -> None:
    decoding = Decoding(backend(LLAMA))
    space_a, begin = PIECES.index("▁a"), PIECES.index("<s>")
    for prompt, first in (([], "a"), ([begin], "a"), ([space_a], " a"), ([begin, space_a], " a")):
        stream = decoding.stream(prompt, skip_special_tokens=True)
        assert [stream.push(space_a), stream.push(space_a)] == [first, " a"]
    assert decoding.stream([begin], skip_special_tokens=False).push(space_a) == " a"


def test_bytes_of_one_token() -> None:
    decoding = Decoding(backend(LLAMA))
    assert [decoding.token_bytes(i) for i in (1, 3, 8, 9, 9999)] == [b"<s>", b" a", b"<0xG0>", "😀".encode(), b""]
    assert decoding.token_bytes(ids_of(b"\xf0")[0]) == b"\xf0"
    assert Decoding(backend(REPLACE)).token_bytes(ids_of(b"\xf0")[0]) == b"<0xF0>"
