"""The response object, at every stage of its making."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rbee_worker.server.openai.answers import Usage
from rbee_worker.server.openai.responses.body import ResponsesBody

Status = Literal["in_progress", "completed", "incomplete", "failed"]
Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ResponseObject:
    """What is known of a response before there is anything of it, and how the rest is put into it.

    Attributes:
        body: what was asked; much of it is repeated.
        id: of the response, and of its job.
        created_at: seconds since 1970.
    """

    body: ResponsesBody
    id: str
    created_at: int

    def to_dict(
        self,
        model: str,
        status: Status,
        output: Sequence[Object] = (),
        *,
        usage: Object | None = None,
        error: Object | None = None,
    ) -> dict[str, Any]:
        """OpenAI's ``response``.

        Args:
            model: what it is called in answers.
            status: how far it is.
            output: its items.
            usage: see :func:`usage_of`; None while it is not known.
            error: why it failed.
        """
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": incomplete,
            "model": model,
            "output": list(output),
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
            "usage": usage,
            **self._repeated(),
        }

    def _repeated(self) -> dict[str, Any]:
        body = self.body
        choice = body.tool_choice
        return {
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


def usage_of(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    """``usage`` of a response; writing to the cache costs nothing and is not counted."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": min(reasoning_tokens, usage.completion_tokens)},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
