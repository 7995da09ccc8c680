"""The shapes of what OpenAI's clients are answered, but for responses; see ``answers.py``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from rbee_worker.server.openai.answers import FinishReason

NULL_TOO: Final = {"null": True}
"""Metadata of a field that may be left out, and may be null too."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that serves, or is to.

    Attributes:
        created: seconds since 1970.
        max_model_len: tokens of prompt and output together at most; null until the model is ready.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    status: Literal["ready", "loading", "failed"]
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class ModelList:
    """Every name of the model."""

    object: Literal["list"]
    data: list[Model]


@dataclass(frozen=True, slots=True)
class PromptTokensDetails:
    """Prompt tokens whose keys and values were reused."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, all its answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@dataclass(frozen=True, slots=True)
class CompletionLogprobs:
    """Log-probabilities in the older shape: lists of one entry for each token.

    Attributes:
        text_offset: where each token begins in the text, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[Mapping[str, float] | None]
    text_offset: list[int]


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuations of one prompt or several."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


@dataclass(frozen=True, slots=True)
class PromptFigures:
    """How much of the prompt has been processed.

    Attributes:
        total: its tokens.
        cache: those whose keys and values were reused.
        processed: those done, reused ones included.
        time_ms: milliseconds since it began.
    """

    total: int
    cache: int
    processed: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class CompletionChunk:
    """A piece of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = field(default=None, metadata=NULL_TOO)
    prompt_progress: PromptFigures | None = None


@dataclass(frozen=True, slots=True)
class ChatTopLogprob:
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


@dataclass(frozen=True, slots=True)
class ChatTokenLogprob:
    """A token, its natural log-probability, and the likeliest ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


@dataclass(frozen=True, slots=True)
class ChatLogprobs:
    """Log-probabilities of an answer's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


@dataclass(frozen=True, slots=True)
class CalledFunction:
    """The function that is called, and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class AnswerToolCall:
    """A tool call of an answer."""

    id: str
    type: Literal["function"]
    function: CalledFunction


@dataclass(frozen=True, slots=True)
class AnswerMessage:
    """The conversation's next message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[AnswerToolCall] | None = None


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


@dataclass(frozen=True, slots=True)
class CalledFunctionDelta:
    """More of a call's function."""

    arguments: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a tool call; its first piece has the id and the name."""

    index: int
    function: CalledFunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


@dataclass(frozen=True, slots=True)
class ChatChunkChoice:
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class ChatCompletionChunk:
    """A piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = field(default=None, metadata=NULL_TOO)
    prompt_progress: PromptFigures | None = None
