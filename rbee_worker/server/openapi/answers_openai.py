"""The shapes of what OpenAI's clients are answered, but for responses."""

from collections.abc import Mapping
from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from rbee_worker.server.http.envelope import ErrorDetail
from rbee_worker.server.openai.answers import FinishReason


class PromptTokensDetails(TypedDict):
    """Prompt tokens whose keys and values were reused."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of a request, all its answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    """Log-probabilities in the older shape: lists of one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[Mapping[str, float] | None]
    text_offset: Annotated[list[int], Field(description="Where each token begins in the text, in characters.")]


class CompletionChoice(TypedDict):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """The continuations of one prompt or several."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class PromptFigures(TypedDict):
    """How much of the prompt has been processed."""

    total: Annotated[int, Field(description="Its tokens.")]
    cache: Annotated[int, Field(description="Those whose keys and values were reused.")]
    processed: Annotated[int, Field(description="Those done, reused ones included.")]
    time_ms: Annotated[int, Field(description="Milliseconds since it began.")]


class CompletionChunk(TypedDict):
    """A piece of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    prompt_progress: NotRequired[PromptFigures]


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


class CalledFunction(TypedDict):
    """The function that is called, and its arguments as JSON text."""

    name: str
    arguments: str


class AnswerToolCall(TypedDict):
    """A tool call of an answer."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(TypedDict):
    """The conversation's next message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[AnswerToolCall]]


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CalledFunctionDelta(TypedDict):
    """More of a call's function."""

    arguments: str
    name: NotRequired[str]


class ToolCallDelta(TypedDict):
    """More of a tool call; its first piece has the id and the name."""

    index: int
    function: CalledFunctionDelta
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]


class Delta(TypedDict):
    """What a chunk adds to a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(TypedDict):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    """A piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_progress: NotRequired[PromptFigures]


class FailedChunk(TypedDict):
    """The error with which a stream of chunks ends when it fails."""

    error: ErrorDetail
