"""Log-probabilities in OpenAI's two forms: for chat, and the older one for completions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final

from pydantic import Field
from typing_extensions import TypedDict

from rbee_worker.events import TokenLogprob

_LOWEST: Final = -9999.0
"""OpenAI's value for a very unlikely token. JSON has no infinity."""

_CONTINUATION, _CONTINUATION_BITS = 0xC0, 0x80
"""Mask and value of the UTF-8 bytes that do not begin a character."""


class ChatTopLogprob(TypedDict):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TypedDict):
    """A token, its natural log-probability, and the likeliest ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """Log-probabilities in the older shape: lists of one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[Mapping[str, float] | None]
    text_offset: Annotated[list[int], Field(description="Where each token begins in the text, in characters.")]


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """``logprobs`` of a choice of a chat completion."""
    return {"content": token_logprobs(tokens), "refusal": None}


def token_logprobs(tokens: Sequence[TokenLogprob]) -> list[ChatTokenLogprob]:
    """OpenAI's entry for each token."""
    return [{**_entry(token), "top_logprobs": [_entry(other) for other in token.top]} for token in tokens]


def _entry(token: TokenLogprob) -> ChatTopLogprob:
    return {"token": token.token, "logprob": _finite(token.logprob), "bytes": list(token.bytes)}


def _finite(logprob: float | None) -> float:
    return max(logprob, _LOWEST) if logprob is not None else _LOWEST


class LogprobsWriter:
    """Writes ``logprobs`` of a completion, piece by piece.

    ``text_offset`` counts characters of the choice's text. A token that begins inside a character has the offset of
    that character.
    """

    def __init__(self) -> None:
        self._characters = 0

    def prompt(self, tokens: Sequence[TokenLogprob], text: str) -> CompletionLogprobs:
        """The piece for the prompt; it must come first. Tokens that are not in ``text``, such as BOS, have offset 0."""
        self._characters = len(text) - sum(_begun(token.bytes) for token in tokens)
        return self.tokens(tokens)

    def tokens(self, tokens: Iterable[TokenLogprob]) -> CompletionLogprobs:
        """The piece for the next tokens."""
        out: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            inside = bool(token.bytes) and not _begins(token.bytes[0])
            out["tokens"].append(_spelling(token))
            out["token_logprobs"].append(None if token.logprob is None else _finite(token.logprob))
            out["top_logprobs"].append(_top(token))
            out["text_offset"].append(max(self._characters - inside, 0))
            self._characters += _begun(token.bytes)
        return out


def joined(pieces: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Join several pieces."""
    return {
        "tokens": [item for piece in pieces for item in piece["tokens"]],
        "token_logprobs": [item for piece in pieces for item in piece["token_logprobs"]],
        "top_logprobs": [item for piece in pieces for item in piece["top_logprobs"]],
        "text_offset": [item for piece in pieces for item in piece["text_offset"]],
    }


def _top(token: TokenLogprob) -> dict[str, float] | None:
    """Text -> log-probability, the likeliest first, the token itself included. None: nothing predicts the token."""
    if token.logprob is None:
        return None
    top = {_spelling(other): _finite(other.logprob) for other in reversed((*token.top, token))}
    return dict(sorted(top.items(), key=lambda item: -item[1]))


def _spelling(token: TokenLogprob) -> str:
    """The text of a token. Bytes that are not UTF-8 are written as OpenAI writes them: ``bytes:`` and hex escapes."""
    data = bytes(token.bytes)
    try:
        return data.decode() if data else token.token
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _begins(byte: int) -> bool:
    return byte & _CONTINUATION != _CONTINUATION_BITS


def _begun(data: Iterable[int]) -> int:
    """How many characters begin in these bytes."""
    return sum(map(_begins, data))
