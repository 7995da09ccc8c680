"""Reads a SentencePiece model file (``tokenizer.model``) without the sentencepiece package.

The file is one protocol-buffers message. Its wire format is simple and its schema has not changed in years, so this
module reads the few fields that a tokenizer needs. The libraries do not fit: protobuf needs generated code, and
sentencepiece does not show the settings of the normalizer. The file is untrusted: sizes are checked before use, and
any bytes give either a model or an error.
Schema: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from rbee_worker.errors import ModelMalformed, ModelUnsupported

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT: Final = 10
_HINT: Final = "Download the file again."

MAX_PIECES: Final = 4_000_000
"""Far more than any vocabulary has."""

Field = tuple[int, int | bytes]


class PieceType(IntEnum):
    """What a piece is for; GGUF's ``tokenizer.ggml.token_type`` has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary. Its id is its index."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What the file holds.

    Attributes:
        pieces: the vocabulary, by id.
        algorithm: ``unigram`` or ``bpe``.
        byte_fallback: whether a character without a piece becomes its UTF-8 bytes instead of the unknown piece.
        unknown_id: the id of the unknown piece.
        bos_id: the id of BOS; None: there is none.
        charsmap: the compiled rules of the normalizer; empty: there are none.
        add_dummy_prefix: whether a space is put before the text.
        remove_extra_whitespaces: whether spaces at both ends are removed, and several spaces become one.
        escape_whitespaces: whether a space is written as U+2581.
    """

    pieces: tuple[Piece, ...]
    algorithm: str
    byte_fallback: bool = False
    unknown_id: int = 0
    bos_id: int | None = None
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


class _Damaged(Exception):
    """The bytes are not a SentencePiece model."""


def read_sentencepiece(data: bytes, *, file: str = "tokenizer.model") -> SentencePieceModel:
    """Read a model.

    Args:
        data: the content of the file.
        file: its name for messages.

    Raises:
        ModelMalformed: the bytes are not a SentencePiece model, or the model is inconsistent.
        ModelUnsupported: an algorithm other than unigram and BPE, or ``treat_whitespace_as_suffix``.
    """
    try:
        model = _model(data, file)
    except _Damaged as error:
        raise ModelMalformed(f"{file} is no SentencePiece model: {error}.", hint=_HINT) from error
    return model


def is_sentencepiece(data: bytes) -> bool:
    """Whether the bytes begin with a piece, as a SentencePiece model does. A rank file begins with base64 text."""
    return data[:1] == b"\x0a"


def _model(data: bytes, file: str) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:  # noqa: PLR2004 (TrainerSpec)
            trainer |= dict(_fields(_message(value)))
        elif number == 3:  # noqa: PLR2004 (NormalizerSpec)
            normalizer |= dict(_fields(_message(value)))
        if len(pieces) > MAX_PIECES:
            raise _Damaged(f"more than {MAX_PIECES} pieces")
    if not pieces:
        raise _Damaged("it has no pieces")
    _refuse_unsupported(trainer, file)
    unknown = [i for i, piece in enumerate(pieces) if piece.type is PieceType.UNKNOWN]
    if len(unknown) != 1:
        raise _Damaged(f"{len(unknown)} pieces are the unknown one; it must be one")
    charsmap = normalizer.get(2, b"")
    if not isinstance(charsmap, bytes):
        raise _Damaged("the normaliser's rules are no bytes")
    return SentencePieceModel(
        pieces=tuple(pieces),
        algorithm="bpe" if trainer.get(3, 1) == 2 else "unigram",  # noqa: PLR2004 (ModelType.BPE)
        byte_fallback=bool(trainer.get(35, 0)),
        unknown_id=unknown[0],
        bos_id=_control(trainer.get(41, 1), pieces),
        charsmap=charsmap,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _control(value: int | bytes, pieces: list[Piece]) -> int | None:
    # -1 stands for none. In the file it is a huge unsigned number.
    if not isinstance(value, int) or value >= len(pieces) or pieces[value].type is not PieceType.CONTROL:
        return None
    return value


def _refuse_unsupported(trainer: dict[int, int | bytes], file: str) -> None:
    algorithm = trainer.get(3, 1)
    if algorithm not in (1, 2):
        name = {3: "word", 4: "char"}.get(algorithm, "unknown") if isinstance(algorithm, int) else "unknown"
        raise ModelUnsupported(
            f"{file}: the SentencePiece algorithm is {name}; supported: unigram, bpe.",
            hint="Use a tokenizer.json of this model.",
        )
    if trainer.get(24, 0):
        raise ModelUnsupported(
            f"{file}: treat_whitespace_as_suffix is set, which is not supported.",
            hint="Use a tokenizer.json of this model.",
        )


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for number, value in _fields(data):
        if number == 1:
            try:
                text = _message(value).decode()
            except UnicodeDecodeError as error:
                raise _Damaged("a piece is not UTF-8") from error
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:  # noqa: PLR2004 (float)
            score = struct.unpack("<f", value)[0]
        elif number == 3:  # noqa: PLR2004 (type)
            try:
                kind = PieceType(value)  # type: ignore[arg-type]
            except ValueError as error:
                raise _Damaged("a piece of an unknown type") from error
    if not score - score == 0.0:  # NaN and infinities
        raise _Damaged("a score is not finite")
    return Piece(text, score, kind)


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _Damaged("a number where bytes belong")
    return value


def _fields(data: bytes) -> Iterator[Field]:
    """The fields of one message: their numbers, and their values as integers or bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == _BYTES:
            size, position = _varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise _Damaged(f"wire type {kind} at byte {position}")
        if size > len(data) - position:
            raise _Damaged(f"a field of {size} bytes at byte {position} runs past the end")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index in range(_LONGEST_VARINT):
        if position + index >= len(data):
            raise _Damaged("it ends in the middle of a number")
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:  # noqa: PLR2004 (the last one)
            return value, position + index + 1
    raise _Damaged(f"a number of more than {_LONGEST_VARINT} bytes at byte {position}")
