"""The response object. It is sent at the beginning of a stream and at its end."""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from rbee_worker.server.openai.choices import UsedTokens
from rbee_worker.server.openai.responses.body import ResponsesBody
from rbee_worker.server.openai.responses.items import OutputItem

Status = Literal["in_progress", "completed", "incomplete", "failed"]


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


def response_object(
    body: ResponsesBody,
    *,
    response_id: str,
    created_at: int,
    model: str,
    status: Status,
    output: Sequence[OutputItem] = (),
    usage: ResponseUsage | None = None,
    error: ResponseError | None = None,
) -> ResponseObject:
    """Make OpenAI's ``response``.

    Args:
        body: the request. The response repeats much of it.
        response_id: the id of the response, and of its job.
        created_at: in seconds since 1970.
        model: the name of the model in the answer.
        status: how far the response is.
        output: its items.
        usage: see :func:`usage_of`; None: not known yet.
        error: why it failed; None: it has not failed.
    """
    choice = body.tool_choice
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status,
        "background": False,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": model,
        "output": list(output),
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
        "usage": usage,
        "instructions": body.instructions,
        "max_output_tokens": body.max_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary},
        "safety_identifier": body.safety_identifier,
        "temperature": body.temperature,
        "text": {"format": body.text.format.to_dict()},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.to_dict() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "user": body.user,
    }


def usage_of(used: UsedTokens, reasoning_tokens: int) -> ResponseUsage:
    """``usage`` of a response. Writing to the cache has no price here, so it is not counted."""
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": 0},
        "output_tokens": used.completion,
        "output_tokens_details": {"reasoning_tokens": min(reasoning_tokens, used.completion)},
        "total_tokens": used.prompt + used.completion,
    }
