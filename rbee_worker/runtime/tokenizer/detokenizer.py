"""Token ids to bytes and text, all at once or one by one.

In a byte-level or SentencePiece vocabulary a token stands for the same bytes everywhere. So a text is the bytes of its
tokens joined, and a stream does not need earlier tokens. Bytes that are not UTF-8 become U+FFFD, one for each maximal
part of a character (Unicode 16, section 3.9, as in Python and Rust); the text around them is not changed. For other
vocabularies the tokenizers library decodes.
"""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import tokenizers

from rbee_worker.errors import InferenceError
from rbee_worker.panics import Panic, panics_as_errors
from rbee_worker.runtime.tokenizer.byte_level import BYTE_OF

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class TextStream(Protocol):
    """Turns tokens into text one by one. ``push`` and ``flush`` return only whole characters."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a vocabulary writes bytes.

    Attributes:
        alphabet: ``byte_level``: a character for each byte. ``pieces``: plain text in which U+2581 stands for a space.
        byte_pieces: whether a piece such as ``<0x0A>`` stands for one byte.
        leading: what is removed where a text begins: nothing, one ``space``, or all spaces of the first ``token``.
    """

    alphabet: Literal["byte_level", "pieces"]
    byte_pieces: bool = False
    leading: Literal["", "space", "token"] = ""


def read_spelling(backend: tokenizers.Tokenizer) -> Spelling | None:
    """How a tokenizer's vocabulary writes bytes, as its decoder tells. None: in another way."""
    if backend.decoder is None:
        return None
    state: Any = backend.decoder.__getstate__()
    outer: Mapping[str, Any] = json.loads(state)
    steps: list[Mapping[str, Any]] = list(outer["decoders"]) if outer["type"] == "Sequence" else [outer]
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return Spelling("byte_level")
    byte_pieces = "ByteFallback" in kinds
    rest = [kind for kind in kinds[1:] if kind != "ByteFallback"]
    first = steps[0] if steps else {"type": ""}
    if first["type"] == "Metaspace" and first["replacement"] == _SPACE and rest in ([], ["Fuse"]):
        return Spelling("pieces", byte_pieces, "token" if first["prepend_scheme"] != "never" else "")
    spaces = first["type"] == "Replace" and first["pattern"] == {"String": _SPACE} and first["content"] == " "
    if spaces and rest in ([], ["Fuse"]):
        return Spelling("pieces", byte_pieces)
    strip = (steps[-1].get("content"), steps[-1].get("start"), steps[-1].get("stop")) if steps else None
    if spaces and rest == ["Fuse", "Strip"] and strip == (" ", 1, 0):
        return Spelling("pieces", byte_pieces, "space")
    return None


class Decoding:
    """Turns token ids into bytes and text.

    Attributes:
        spelling: how the vocabulary writes bytes; None: the tokenizers library decodes.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in self._added.items() if token.special)
        self._known: dict[int, bytes] = {}  # filled when asked; at most the size of the vocabulary
        self.spelling = read_spelling(backend)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; those of its text for a special token. Empty for an id without a token."""
        data = self._known.get(token)
        if data is None:
            piece = self._backend.id_to_token(token)
            if piece is None:
                return b""
            data = self._known[token] = self._spelled(token, piece)
        return data

    def _spelled(self, token: int, piece: str) -> bytes:
        if self.spelling is not None and self.spelling.alphabet == "byte_level":
            return piece.encode() if token in self._added else bytes([BYTE_OF.get(char, ord("?")) for char in piece])
        if token not in self._special and _is_byte(piece) and (self.spelling is None or self.spelling.byte_pieces):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(_SPACE, " ").encode()

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens.

        Raises:
            InferenceError: the tokenizers library panics.
        """
        if self.spelling is None:
            return _decode(self._backend, list(ids), skip=skip_special_tokens)
        parts = [self.token_bytes(token) for token in ids if self.counts(token, skip=skip_special_tokens)]
        first = next((i for i, data in enumerate(parts) if data), None)
        if first is not None:
            parts[first] = self.without_leading(parts[first])
        return b"".join(parts).decode(errors="replace")

    def stream(self, prompt: Sequence[int], *, skip_special_tokens: bool) -> TextStream:
        """A stream of the text that follows ``prompt``. The last tokens of the prompt are enough."""
        if self.spelling is None:
            return _WindowStream(self._backend, prompt, skip_special_tokens=skip_special_tokens)
        begins = not any(self._backend.id_to_token(t) and self.counts(t, skip=skip_special_tokens) for t in prompt)
        return _ByteStream(self, skip_special_tokens=skip_special_tokens, begins=begins)

    def without_leading(self, data: bytes) -> bytes:
        """The bytes of a text's first token, without the spaces that are removed there."""
        leading = self.spelling.leading if self.spelling is not None else ""
        return data.replace(b" ", b"") if leading == "token" else data.removeprefix(b" ") if leading else data

    def counts(self, token: int, *, skip: bool) -> bool:
        """Whether a token is part of the text. ``skip``: special tokens are not."""
        return not (skip and token in self._special)


def _decode(backend: tokenizers.Tokenizer, ids: list[int], *, skip: bool) -> str:
    try:
        with panics_as_errors():
            return backend.decode(ids, skip_special_tokens=skip)
    except Panic as panic:  # what it says may hold the text
        raise InferenceError("The model's tokenizer cannot decode its tokens.") from panic


def _is_byte(piece: str) -> bool:
    if len(piece) != len("<0x00>") or not (piece.startswith("<0x") and piece.endswith(">")):
        return False
    return all(char in "0123456789abcdefABCDEF" for char in piece[3:-1])


class _ByteStream:
    """For vocabularies in which each token stands for the same bytes everywhere."""

    __slots__ = ("_begins", "_decoding", "_skip", "_utf8")

    def __init__(self, decoding: Decoding, *, skip_special_tokens: bool, begins: bool) -> None:
        self._decoding = decoding
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begins = begins

    def push(self, token: int) -> str:
        if not self._decoding.counts(token, skip=self._skip):
            return ""
        data = self._decoding.token_bytes(token)
        if self._begins and data:
            self._begins = False
            data = self._decoding.without_leading(data)
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream:
    """For vocabularies in which a token's text depends on its neighbors: each is decoded again with the few before it.

    Text that ends in U+FFFD may be the start of a character and is held back. Decoding starts a few tokens back,
    because some decoders treat the first token specially.
    """

    __slots__ = ("_backend", "_ids", "_read", "_skip", "_start")

    def __init__(self, backend: tokenizers.Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._ids = list(prompt)
        self._start = 0
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = _decode(self._backend, self._ids[self._start : self._read], skip=self._skip)
        after = _decode(self._backend, self._ids[self._start :], skip=self._skip)
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]
