"""Chat completions: a conversation's next message, in OpenAI's shape."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rbee_worker.chat.output import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from rbee_worker.events import PromptProgress, Started
from rbee_worker.server.openai.chat.body import ChatBody, NamedTool
from rbee_worker.server.openai.conversation import ChatStep, Conversation, ConversationReply
from rbee_worker.server.openai.logprobs import chat_logprobs
from rbee_worker.server.openai.requests import progress


def to_conversation(body: ChatBody, client: str) -> Conversation:
    """What a chat completion asks for.

    Raises:
        InvalidRequest: two fields say what the answer must match.
    """
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    word = body.tool_choice if isinstance(body.tool_choice, str) else None
    variables: dict[str, Any] = {}
    if body.documents is not None:
        variables["documents"] = body.documents
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
        if body.reasoning_effort == "none":
            variables["enable_thinking"] = False
    return Conversation(
        messages=tuple(message.to_message() for message in body.messages),
        sampling=body.sampling(
            max_tokens=body.max_completion_tokens or body.max_tokens, logprobs=body.told_logprobs, grammar=None
        ),
        grammar=body.grammar_spec,
        tools=tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ()),
        tool_choice="required" if named is not None else word or "auto",
        tool_name=named,
        parallel_tool_calls=body.parallel_tool_calls,
        variables=variables | (body.chat_template_kwargs or {}),
        choices=body.n,
        prompt_progress=body.prompt_progress and body.stream,
        client=client,
        timeout_seconds=body.timeout,
    )


class ChatChunks:
    """Writes the steps of a reply as the chunks of a stream."""

    def __init__(self, reply: ConversationReply, body: ChatBody, response_id: str, model: str) -> None:
        self._reply = reply
        self._body = body
        self._head: dict[str, Any] = {
            "id": response_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def __call__(self, step: ChatStep) -> list[dict[str, Any]]:
        """The chunks of one step."""
        event = step.event
        if isinstance(event, Started):
            return [self._chunk(step.index, {"role": "assistant", "content": ""})]
        if isinstance(event, PromptProgress):
            return [self._chunk(step.index, {}) | progress(event)] if step.index == 0 else []
        chunks = [self._chunk(step.index, _delta(delta)) for delta in step.deltas]
        if step.finish_reason is not None:
            chunks.append(self._chunk(step.index, {}, step.finish_reason))
            if self._reply.ended and self._body.include_usage:
                chunks.append(self._head | {"choices": [], "usage": self._reply.usage.to_dict()})
        if step.logprobs:
            chunks[0]["choices"][0]["logprobs"] = chat_logprobs(step.logprobs)
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self._body.include_usage else {}
        return self._head | {"choices": [choice]} | usage


def _delta(delta: Delta) -> dict[str, Any]:
    match delta:
        case ContentDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case ToolCallDelta(index, call_id, name, arguments):
            function = {"name": name} if name is not None else {}
            call: dict[str, Any] = {"index": index, "function": function | {"arguments": arguments}}
            if call_id is not None:
                call |= {"id": call_id, "type": "function"}
            return {"tool_calls": [call]}


@dataclass(slots=True)
class _Choice:
    """One answer, put together."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None

    def add(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            match delta:
                case ContentDelta(text):
                    self.content.append(text)
                case ReasoningDelta(text):
                    self.reasoning.append(text)
                case ToolCallDelta(index, call_id, name, arguments):
                    function = {"name": name, "arguments": ""}
                    new = {"id": call_id, "type": "function", "function": function}
                    self.calls.setdefault(index, new)["function"]["arguments"] += arguments

    def message(self) -> dict[str, Any]:
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["content"] = content or None
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
        return message


async def whole_chat(reply: ConversationReply, body: ChatBody, response_id: str, model: str) -> dict[str, Any]:
    """The response to a chat completion that is not streamed.

    Raises:
        RbeeError: an answer failed.
    """
    created = int(time.time())
    choices = [_Choice() for _ in range(body.n)]
    async for step in reply:
        choice = choices[step.index]
        choice.add(step.deltas)
        choice.logprobs += step.logprobs
        choice.finish = step.finish_reason or choice.finish
    return {
        "id": response_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": chat_logprobs(choice.logprobs) if body.logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": reply.usage.to_dict(),
    }
