"""The shapes of answers, for their description: what the routes send, checked against it by the tests.

A field whose default is None is left out of an answer rather than sent as null; every other field is always there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from rbee_worker.runtime.memory import DeviceInfo
from rbee_worker.server.openai.answers import FinishReason
from rbee_worker.worker import State

NULL_TOO: Final = {"null": True}
"""Metadata of a field that may be left out, and may be null too."""


@dataclass(frozen=True, slots=True)
class BadField:
    """One bad field of a request: its name, the constraint it breaks, and a sentence about it."""

    field: str
    constraint: str
    message: str


@dataclass(frozen=True, slots=True)
class ErrorDetail:
    """What is wrong, for people and for programs.

    Attributes:
        message: for people; never holds the text of a prompt.
        type: the class of the error.
        param: the first bad field, or null.
        code: for programs.
    """

    message: str
    type: str
    param: str | None
    code: str


@dataclass(frozen=True, slots=True)
class ErrorEnvelope:
    """Every error.

    Attributes:
        errors: every bad field of the request; empty for other errors.
    """

    error: ErrorDetail
    errors: list[BadField]


@dataclass(frozen=True, slots=True)
class FailedChunk:
    """The error with which a stream of chunks ends when it fails."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class Index:
    """Who answers here."""

    name: Literal["rbee-worker"]
    version: str
    ready_url: str


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the worker is well.

    Attributes:
        vram_bytes: memory of the weights, those of a load under way included.
        reason: why the worker is unhealthy.
        code: of the error of the load that failed.
    """

    status: Literal["healthy", "unhealthy"]
    state: State
    vram_bytes: int
    reason: str | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Life:
    """Whether the engine's thread lives.

    Attributes:
        reason: why it does not.
    """

    status: Literal["alive", "dead"]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ReadyStatus:
    """Whether requests would be served now, as a status."""

    ready: bool
    state: State | None = None


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether requests would be served now, in words.

    Attributes:
        progress_url: where the load's events are, once a load was asked for.
    """

    ready: bool
    state: Literal["idle", "busy"] | State
    model_loaded: bool | None = None
    progress_url: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """The worker, its model and its devices.

    Attributes:
        id: a UUID, new at each start.
        model: null without a model.
        context_length: tokens of prompt and output together at most; null without a model.
        loading: whether a load runs.
        vram_bytes: memory of the weights, those of a load under way included.
        running: requests with a place in the batch.
        queued: requests waiting for one.
    """

    id: str
    version: str
    model: str | None
    context_length: int | None
    state: State
    loading: bool
    devices: list[DeviceInfo]
    vram_bytes: int
    running: int
    queued: int
    uptime_seconds: float


@dataclass(frozen=True, slots=True)
class LoadAccepted:
    """The load has begun.

    Attributes:
        progress_url: where its events are.
        resident_keeps_serving: whether the model that serves goes on until the new one is ready.
    """

    progress_url: str
    model: str
    resident_keeps_serving: bool


@dataclass(frozen=True, slots=True)
class CancelAccepted:
    """The load is being cancelled.

    Attributes:
        progress_url: where its events are.
    """

    progress_url: str


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The model is gone.

    Attributes:
        vram_bytes_freed: 0 when there was none.
    """

    vram_bytes_freed: int


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The ids of a text's tokens."""

    tokens: list[int]


@dataclass(frozen=True, slots=True)
class DecodedText:
    """The text of token ids; special tokens are written out."""

    text: str


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
