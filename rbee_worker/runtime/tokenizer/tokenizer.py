"""Tokenizer: text to token ids and back. StreamingDetokenizer: token ids to text, one at a time."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import tokenizers

from rbee_worker.config import Message
from rbee_worker.errors import ContextTooLong, FieldError, InferenceError, InvalidRequest, ModelMalformed
from rbee_worker.escape import quoted
from rbee_worker.panics import panics_as_errors
from rbee_worker.runtime.tokenizer.bombs import growth_of
from rbee_worker.runtime.tokenizer.chat_template import ChatTemplate
from rbee_worker.runtime.tokenizer.detokenizer import Decoding, TextStream
from rbee_worker.runtime.tokenizer.files import SPECIAL_TOKEN_KEYS, token_text
from rbee_worker.runtime.tokenizer.lookalikes import LookAlikes, SecretNames

_CHARACTERS_PER_TOKEN = 8
"""A text with more has more than is usual: English has four to five."""
_DIRECT, _PIECE, _SMALLEST_PIECE = 2**24, 2**18, 256
"""Characters, after the tokenizer's own steps: how many are tokenized without a count, and in a piece when counted."""
_SHORT = 2**16
"""Characters that are tokenized in a moment."""


class TokenizerFiles(Protocol):
    """What a model's files hold about its tokenizer. ``source.ModelSource`` has these attributes."""

    @property
    def tokenizer(self) -> tokenizers.Tokenizer: ...
    @property
    def tokenizer_config(self) -> Mapping[str, Any]: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def generation_config(self) -> Mapping[str, Any]: ...
    @property
    def chat_templates(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation: its text, and its token ids."""

    text: str
    ids: list[int]


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        eos_ids: ids that end generation: all that ``generation_config.json`` and ``config.json`` name; without any, the
            one that ``tokenizer_config.json`` names.
        vocab_size: number of tokens, added ones included.
        context_length: tokens of prompt and answer together at most; None: not known.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, eos_ids: frozenset[int], template: ChatTemplate | None = None
    ) -> None:
        self._backend = backend
        self._template = template
        self.eos_ids = eos_ids
        self.context_length: int | None = None
        self._added = backend.get_added_tokens_decoder()
        self._decoding = Decoding(backend)
        self._look_alikes = LookAlikes(
            self.special_tokens, self.added_tokens, template.constants if template is not None else ()
        )
        self._growth = growth_of(backend, "The model's tokenizer")
        self._one_long_text = threading.Lock()
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> "Tokenizer":
        """Read a model's tokenizer, chat template and end-of-sequence ids.

        Raises:
            ModelError: a file is missing, damaged or not supported.
        """
        backend = files.tokenizer
        backend.no_padding()
        backend.no_truncation()
        config = files.tokenizer_config
        special = {key: text for key in SPECIAL_TOKEN_KEYS if (text := token_text(config.get(key))) is not None}
        texts = dict(files.chat_templates)
        text = texts.pop("default", None)
        template = ChatTemplate(text, special, named=texts) if text is not None else None
        eos_ids = _ids(files.generation_config, "generation_config.json") | _ids(files.config, "config.json")
        if not eos_ids and (named := special.get("eos_token")) is not None:
            found = backend.token_to_id(named)
            eos_ids = frozenset() if found is None else frozenset({found})
        return cls(backend, eos_ids=eos_ids, template=template)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template, which :meth:`render_chat` needs."""
        return self._template is not None

    @property
    def added_tokens(self) -> dict[str, int]:
        """The tokens that were added to the vocabulary, special or not: text -> id."""
        return {token.content: id_ for id_, token in self._added.items()}

    @property
    def special_tokens(self) -> frozenset[str]:
        """The texts of the special tokens. Decoded text leaves them out by default."""
        return frozenset(token.content for token in self._added.values() if token.special)

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template; None: the model has none."""
        return self._template.source if self._template is not None else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. A special token that is written out in the text becomes that token.

        Args:
            text: the text.
            add_special_tokens: whether to put special tokens such as BOS around it, as the model's tokenizer says.

        Raises:
            InvalidRequest: the text holds half of a surrogate pair, which is not a character.
            InferenceError: the tokenizers library fails.
        """
        _require_characters(text)
        with _encoding():
            return self._encoded(self._backend, text, add_special_tokens=add_special_tokens)

    def require_room(self, text: str, field: str) -> None:
        """Refuse a prompt with far more tokens than the context has, before all of it is tokenized.

        Nothing tells from its length how many tokens a text has: a tokenizer may drop a part of it. So a text that is
        long for the tokens is counted in pieces, and refused where they have twice as many. Cut into pieces, a text may
        have a few tokens more.

        Raises:
            ContextTooLong: it has; the error names ``field`` of the request.
        """
        most = self.context_length
        if most is None or len(text) <= min(_CHARACTERS_PER_TOKEN * most, _DIRECT / self._growth):
            return
        size, count = max(int(_PIECE / self._growth), _SMALLEST_PIECE), 0
        with _encoding():
            for begin in range(0, len(text), size):
                piece = text[begin : begin + size]
                count += len(self._encoded(self._backend, piece, add_special_tokens=False))
                if count > 2 * most:
                    problem = f"The prompt has more than {2 * most} tokens; the context holds {most} with the answer."
                    bad = FieldError(field, f"at most {most - 1} tokens", problem)
                    raise ContextTooLong(problem, fields=[bad])

    def _encoded(self, backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        # Unlike `encode`, this lets other threads run, and it leaves out the offsets, which take most of the memory.
        if len(text) <= _SHORT:
            return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        with self._one_long_text:  # several at a time would only take more memory
            return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            InferenceError: the tokenizers library panics.
        """
        return self._decoding.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(self, prompt: Sequence[int], *, skip_special_tokens: bool) -> TextStream:
        """A stream that turns the tokens after ``prompt`` into text, one by one."""
        return self._decoding.stream(prompt, skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """The tokenizer as text of a ``tokenizer.json``."""
        return str(self._backend.to_str())

    def token_text(self, token: int) -> str:
        """The text of one token alone, also of a special one. Bytes that are not UTF-8 become U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; those of its text for a special token. Empty for an id without a token."""
        return self._decoding.token_bytes(token)

    def render_chat(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """Messages as prompt text, special tokens included.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("The model has no chat template.", hint="Send a prompt instead of messages.")
        return self._template.render(messages, **variables)

    def encode_chat(self, messages: Sequence[Message], field: str = "messages", /, **variables: Any) -> ChatPrompt:
        """Messages as the prompt that asks for the assistant's next message.

        ``field`` of the request holds them, for errors.

        Only special tokens of the template become special tokens. One that is written out in a message, a tool or a
        document is encoded as plain text (see :mod:`rbee_worker.runtime.tokenizer.lookalikes`).

        Raises:
            InvalidRequest: as :meth:`render_chat` and :meth:`encode`; or the template does not copy a special token in
                a message as plain text.
            InferenceError: the tokenizers library fails.
            ContextTooLong: as :meth:`require_room`.
        """
        text = self.render_chat(messages, **variables)
        _require_characters(text)
        self.require_room(text, field)
        marked = self._look_alikes.mark(text, lambda m, v: self.render_chat(m, **v), messages, variables)
        if marked is None:
            return ChatPrompt(text, self.encode(text, add_special_tokens=False))
        with _encoding():
            names = self._secret_names
            return ChatPrompt(text, self._encoded(names.backend, names.named(text, marked), add_special_tokens=False))

    @cached_property
    def _secret_names(self) -> SecretNames:
        return SecretNames(self._backend)


class StreamingDetokenizer:
    """Turns tokens into text one at a time, never splitting a character.

    The texts it returns, joined, equal the text of all tokens decoded at once after the last tokens of the prompt.
    Bytes that may be the start of a character are held until a later token completes it, or until :meth:`flush`.
    """

    _CONTEXT = 6
    """Tokens of the prompt that are used: the text of the first generated token may depend on those before it."""

    __slots__ = ("_stream",)

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._stream = tokenizer.stream(prompt[-self._CONTEXT :], skip_special_tokens=skip_special_tokens)

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        return self._stream.push(token)

    def flush(self) -> str:
        """The text of the bytes that are still held."""
        return self._stream.flush()


@contextmanager
def _encoding() -> Iterator[None]:
    """Turn a failure of the library into an error without the library's message, which may hold the text."""
    try:
        with panics_as_errors():
            yield
    except (ContextTooLong, MemoryError):
        raise
    except Exception as error:  # a panic, or a plain Exception
        raise InferenceError("The model's tokenizer cannot encode this text.") from error


def _require_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"The text holds half of a surrogate pair (U+{ord(text[error.start]):04X}), which is no character.",
            hint="Send the whole pair, or leave it out.",
        ) from None


def _ids(config: Mapping[str, Any], file: str) -> frozenset[int]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
        raise ModelMalformed(f"{file}: eos_token_id is {quoted(value)}; it must be an id or a list of ids.")
    return frozenset(values)
