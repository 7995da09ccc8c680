"""Text to token ids and back, and the streaming detokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import tokenizers

from rbee_worker.config import Message
from rbee_worker.errors import InvalidRequest, ModelMalformed
from rbee_worker.runtime.chat_template import ChatTemplate

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenizerFiles(Protocol):
    """What a model's files say about its tokenizer; ``source.ModelSource`` is one."""

    def tokenizer(self) -> tokenizers.Tokenizer: ...
    def tokenizer_config(self) -> dict[str, Any]: ...
    def config(self) -> dict[str, Any]: ...
    def generation_config(self) -> dict[str, Any]: ...
    def chat_template(self) -> str | None: ...


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character stands for in byte-level vocabularies (GPT-2).

    Printable Latin-1 stands for itself, the other bytes, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF: Mapping[str, int] = MappingProxyType(_byte_level_alphabet())


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation: its text, and its token ids."""

    text: str
    ids: list[int]


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        eos_ids: ids that end generation: all of ``generation_config.json`` and ``config.json``, else the one that
            ``tokenizer_config.json`` names.
        vocab_size: number of ids, added tokens included.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, eos_ids: frozenset[int], template: ChatTemplate | None = None
    ) -> None:
        self._backend = backend
        self._template = template
        self.eos_ids = eos_ids
        self._added = backend.get_added_tokens_decoder()
        self._byte_level = "ByteLevel" in repr(backend.decoder)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> "Tokenizer":
        """Read a model's tokenizer, chat template and end-of-sequence ids.

        Raises:
            ModelMalformed: one of them is damaged.
        """
        backend = files.tokenizer()
        backend.no_padding()
        backend.no_truncation()
        special = _special_tokens(files.tokenizer_config())
        text = files.chat_template()
        template = ChatTemplate(text, special) if text is not None else None
        eos_ids = _ids(files.generation_config(), "generation_config.json") | _ids(files.config(), "config.json")
        if not eos_ids and (named := special.get("eos_token")) is not None:
            found = backend.token_to_id(named)
            eos_ids = frozenset() if found is None else frozenset({found})
        return cls(backend, eos_ids=eos_ids, template=template)

    @property
    def has_chat_template(self) -> bool:
        """Whether :meth:`render_chat` works."""
        return self._template is not None

    @property
    def chat_template(self) -> str | None:
        """The chat template's source; None: the model has none."""
        return self._template.source if self._template is not None else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; ``add_special_tokens`` puts the model's own, such as BOS, around it."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """The tokenizer as ``tokenizer.json`` holds it."""
        return str(self._backend.to_str())

    def token_text(self, token: int) -> str:
        """The text of one token alone, special ones written out; bytes that are no UTF-8 become U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, special ones written out; none for an id that has no token."""
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if token in self._added:
            return piece.encode()
        if self._byte_level:
            return bytes(_BYTE_OF.get(char, ord("?")) for char in piece)
        if len(piece) == len("<0x00>") and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:-1])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def render_chat(self, messages: Sequence[Message], **variables: Any) -> str:
        """Messages as prompt text, special tokens included.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("The model has no chat template.", hint="Send a prompt instead of messages.")
        return self._template.render(messages, **variables)

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> ChatPrompt:
        """Messages as the prompt that asks for the assistant's next one.

        Raises:
            InvalidRequest: as :meth:`render_chat`.
        """
        text = self.render_chat(messages, **variables)
        return ChatPrompt(text, self.encode(text, add_special_tokens=False))


class StreamingDetokenizer:
    """Turns tokens into text one at a time, never splitting a character.

    The pieces it returns, put together, equal decoding all the tokens at once behind the prompt's last ones. Text that
    ends in U+FFFD may be the start of a character and is held until a later token completes it, or until :meth:`flush`.

    Decoding starts a few tokens back each time, not at the newest: decoders that treat the first token specially (by
    dropping its leading space) then see it where it stands.
    """

    _CONTEXT = 6
    """Tokens of the prompt decoded along for what they say about the first generated one."""

    __slots__ = ("_ids", "_read", "_skip_special_tokens", "_start", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(prompt[-self._CONTEXT :])
        self._start = 0
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is held, as decoding all at once would give it."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        skip = self._skip_special_tokens
        before = self._tokenizer.decode(self._ids[self._start : self._read], skip_special_tokens=skip)
        after = self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=skip)
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for key in _SPECIAL_TOKEN_KEYS:
        value = config.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            tokens[key] = value
    return tokens


def _ids(config: Mapping[str, Any], file: str) -> frozenset[int]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
        raise ModelMalformed(f"{file}: eos_token_id is {value!r:.80}; it must be an id or a list of ids.")
    return frozenset(values)
