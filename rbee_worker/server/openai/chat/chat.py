"""Chat completions: a conversation's next message, in OpenAI's shape."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from rbee_worker.chat import output
from rbee_worker.events import PromptProgress, Started, TokenLogprob
from rbee_worker.server.openai.answers import FinishReason, Usage
from rbee_worker.server.openai.chat.body import ChatBody, NamedTool
from rbee_worker.server.openai.conversation import ChatStep, Conversation, ConversationReply
from rbee_worker.server.openai.logprobs import ChatLogprobs, chat_logprobs
from rbee_worker.server.openai.requests import PromptFigures, prompt_figures


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
        self._id = response_id
        self._created = int(time.time())
        self._model = model

    def __call__(self, step: ChatStep) -> list[ChatCompletionChunk]:
        """The chunks of one step."""
        event = step.event
        if isinstance(event, Started):
            return [self._chunk([_choice(step.index, {"role": "assistant", "content": ""})])]
        if isinstance(event, PromptProgress):
            if step.index > 0:
                return []
            chunk = self._chunk([_choice(step.index, {})])
            chunk["prompt_progress"] = prompt_figures(event)
            return [chunk]
        choices = [_choice(step.index, _delta(delta)) for delta in step.deltas]
        if step.finish_reason is not None:
            choices.append(_choice(step.index, {}, step.finish_reason))
        if step.logprobs:
            choices[0]["logprobs"] = chat_logprobs(step.logprobs)
        chunks = [self._chunk([choice]) for choice in choices]
        if step.finish_reason is not None and self._reply.ended and self._body.include_usage:
            chunks.append(self._chunk([], self._reply.usage.to_dict()))
        return chunks

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatCompletionChunk:
        chunk: ChatCompletionChunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        if self._body.include_usage:
            chunk["usage"] = usage
        return chunk


def _choice(index: int, delta: Delta, finish: FinishReason | None = None) -> ChatChunkChoice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _delta(delta: output.Delta) -> Delta:
    match delta:
        case output.ContentDelta(text):
            return {"content": text}
        case output.ReasoningDelta(text):
            return {"reasoning_content": text}
        case output.ToolCallDelta(index, call_id, name, arguments):
            function: CalledFunctionDelta = (
                {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
            )
            call: ToolCallDelta = {"index": index, "function": function}
            if call_id is not None:
                call["id"], call["type"] = call_id, "function"
            return {"tool_calls": [call]}


@dataclass(slots=True)
class _Answer:
    """One answer, put together."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, AnswerToolCall] = field(default_factory=dict)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason = "stop"

    def add(self, deltas: Sequence[output.Delta]) -> None:
        for delta in deltas:
            match delta:
                case output.ContentDelta(text):
                    self.content.append(text)
                case output.ReasoningDelta(text):
                    self.reasoning.append(text)
                case output.ToolCallDelta(index, call_id, name, arguments):
                    function: CalledFunction = {"name": name or "", "arguments": ""}
                    new: AnswerToolCall = {"id": call_id or "", "type": "function", "function": function}
                    self.calls.setdefault(index, new)["function"]["arguments"] += arguments

    def message(self) -> AnswerMessage:
        content = "".join(self.content)
        message: AnswerMessage = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["content"] = content or None
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
        return message


async def whole_chat(reply: ConversationReply, body: ChatBody, response_id: str, model: str) -> ChatCompletion:
    """The response to a chat completion that is not streamed.

    Raises:
        RbeeError: an answer failed.
    """
    created = int(time.time())
    answers = [_Answer() for _ in range(body.n)]
    async for step in reply:
        answer = answers[step.index]
        answer.add(step.deltas)
        answer.logprobs += step.logprobs
        answer.finish = step.finish_reason or answer.finish
    return {
        "id": response_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                "message": answer.message(),
                "logprobs": chat_logprobs(answer.logprobs) if body.logprobs else None,
                "finish_reason": answer.finish,
            }
            for index, answer in enumerate(answers)
        ],
        "usage": reply.usage.to_dict(),
    }
