"""The shapes of OpenAI's responses and of the events of their streams."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from rbee_worker.server.http.envelope import ErrorDetail
from rbee_worker.server.openai.responses.items import ItemStatus
from rbee_worker.server.openai.responses.object import Status
from rbee_worker.server.openapi.answers_openai import ChatTokenLogprob


class OutputText(TypedDict):
    """What a message says."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatTokenLogprob]


class OutputReasoningText(TypedDict):
    """What the model thought."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(TypedDict):
    """The answer itself."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(TypedDict):
    """What the model thinks before it answers; no summaries are made."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[OutputReasoningText]


class OutputCall(TypedDict):
    """A call of a function; its arguments are JSON text."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(TypedDict):
    """Prompt tokens whose keys and values were reused; writing to the cache is not counted."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    """Tokens of the reasoning."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    """Why a response failed."""

    code: str
    message: str


class RepeatedReasoning(TypedDict):
    """What was asked of the reasoning."""

    effort: str | None
    summary: str | None


class ResponseObject(TypedDict):
    """A response, at every stage of its making; much of it repeats what was asked."""

    id: str
    object: Literal["response"]
    created_at: Annotated[int, Field(description="Seconds since 1970.")]
    completed_at: int | None
    status: Status
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: Annotated[list[OutputItem], Field(description="Its items; empty until it has ended.")]
    previous_response_id: None
    service_tier: Literal["default"]
    store: Literal[False]
    truncation: Literal["disabled"]
    usage: Annotated[ResponseUsage | None, Field(description="Null until it has ended.")]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: Mapping[str, str]
    parallel_tool_calls: bool
    presence_penalty: float
    frequency_penalty: float
    prompt_cache_key: str | None
    reasoning: RepeatedReasoning
    safety_identifier: str | None
    temperature: float
    text: Mapping[str, Any]
    tool_choice: str | Mapping[str, Any]
    tools: list[Mapping[str, Any]]
    top_logprobs: int
    top_p: float
    user: str | None


class ResponseStageEvent(TypedDict):
    """How far the response is; the last three end the stream."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    sequence_number: int
    response: ResponseObject


class ResponseItemEvent(TypedDict):
    """An item begins, or is whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class ResponsePartEvent(TypedDict):
    """A part of an item begins, or is whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText | OutputReasoningText


class ResponseTextDeltaEvent(TypedDict):
    """More of the answer."""

    type: Literal["response.output_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatTokenLogprob]


class ResponseTextDoneEvent(TypedDict):
    """The answer is whole."""

    type: Literal["response.output_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatTokenLogprob]


class ResponseReasoningDeltaEvent(TypedDict):
    """More of the reasoning."""

    type: Literal["response.reasoning_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str


class ResponseReasoningDoneEvent(TypedDict):
    """The reasoning is whole."""

    type: Literal["response.reasoning_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str


class ResponseArgumentsDeltaEvent(TypedDict):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ResponseArgumentsDoneEvent(TypedDict):
    """A call's arguments are whole."""

    type: Literal["response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


class ResponseErrorEvent(TypedDict):
    """The stream fails."""

    type: Literal["error"]
    sequence_number: int
    code: str
    message: str
    param: str | None
    error: ErrorDetail


RESPONSE_EVENTS = (
    ResponseStageEvent,
    ResponseItemEvent,
    ResponsePartEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    ResponseReasoningDeltaEvent,
    ResponseReasoningDoneEvent,
    ResponseArgumentsDeltaEvent,
    ResponseArgumentsDoneEvent,
    ResponseErrorEvent,
)
"""What may come in the stream of a response."""
