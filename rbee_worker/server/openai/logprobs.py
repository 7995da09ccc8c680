"""Log-probabilities in OpenAI's two shapes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final

from pydantic import Field
from typing_extensions import TypedDict

from rbee_worker.events import TokenLogprob

_LOWEST: Final = -9999.0
"""What OpenAI says for a token too unlikely to be told; JSON has no infinity."""

_CONTINUATION, _CONTINUATION_BITS = 0xC0, 0x80
"""Mask and value of UTF-8's bytes that do not begin a character."""


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
    """``logprobs`` of a chat choice."""
    return {"content": token_logprobs(tokens), "refusal": None}


def token_logprobs(tokens: Sequence[TokenLogprob]) -> list[ChatTokenLogprob]:
    """An entry for each token."""
    return [{**_entry(token), "top_logprobs": [_entry(other) for other in token.top]} for token in tokens]


def _entry(token: TokenLogprob) -> ChatTopLogprob:
    return {"token": token.token, "logprob": _finite(token.logprob), "bytes": list(token.bytes)}


def _finite(logprob: float | None) -> float:
    return max(logprob, _LOWEST) if logprob is not None else _LOWEST


class LogprobsWriter:
    """Writes ``logprobs`` of a completion, a piece at a time.

    ``text_offset`` counts characters of the choice's text; a token that begins within a character has that one's.
    """

    def __init__(self) -> None:
        self._characters = 0

    def prompt(self, tokens: Sequence[TokenLogprob], text: str) -> CompletionLogprobs:
        """Those of the prompt, whose ``text`` comes first; tokens that are not in it, such as BOS, stand at 0."""
        self._characters = len(text) - sum(_begun(token.bytes) for token in tokens)
        return self.tokens(tokens)

    def skip(self, text: str) -> None:
        """Count a text whose tokens are not told."""
        self._characters += len(text)

    def tokens(self, tokens: Iterable[TokenLogprob]) -> CompletionLogprobs:
        """Those of the next tokens."""
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
    """Several pieces as one."""
    return {
        "tokens": [item for piece in pieces for item in piece["tokens"]],
        "token_logprobs": [item for piece in pieces for item in piece["token_logprobs"]],
        "top_logprobs": [item for piece in pieces for item in piece["top_logprobs"]],
        "text_offset": [item for piece in pieces for item in piece["text_offset"]],
    }


def _top(token: TokenLogprob) -> dict[str, float] | None:
    """By their text, likeliest first, the token itself among them; None for a token that nothing predicts."""
    if token.logprob is None:
        return None
    top = {_spelling(other): _finite(other.logprob) for other in reversed((*token.top, token))}
    return dict(sorted(top.items(), key=lambda item: -item[1]))


def _spelling(token: TokenLogprob) -> str:
    """A token's text; of bytes that are no UTF-8, the bytes, as OpenAI spells them."""
    data = bytes(token.bytes)
    try:
        return data.decode() if data else token.token
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _begins(byte: int) -> bool:
    return byte & _CONTINUATION != _CONTINUATION_BITS


def _begun(data: Iterable[int]) -> int:
    """Characters that begin in these bytes."""
    return sum(map(_begins, data))
