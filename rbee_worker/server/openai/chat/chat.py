"""Chat completions: the next message of a conversation, in OpenAI's form."""

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from rbee_worker.chat import deltas
from rbee_worker.events import PromptProgress, Started, TokenLogprob
from rbee_worker.server.openai.chat.body import ChatBody, NamedTool
from rbee_worker.server.openai.choices import FinishReason, Usage
from rbee_worker.server.openai.chunks import PromptFigures, prompt_figures
from rbee_worker.server.openai.conversation import ChatChoices, ChatPiece, Conversation
from rbee_worker.server.openai.logprobs import ChatLogprobs, chat_logprobs
from rbee_worker.server.sse import Frames, frame


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
    """The conversation that a body asks for. ``client``: the name of the client.

    Raises:
        InvalidRequest: several fields say what the answer must match, or a value is out of range.
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


async def chat_frames(choices: ChatChoices, body: ChatBody, response_id: str, model: str) -> Frames:
    """The frames of a streamed chat completion.

    Args:
        choices: the choices.
        body: the request.
        response_id: the id in the answer.
        model: the name of the model in the answer.

    Raises:
        RbeeError: a choice failed.
    """
    created = int(time.time())

    def chunk(*choices: ChatChunkChoice) -> ChatCompletionChunk:
        made: ChatCompletionChunk = {
            "id": response_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "choices": list(choices),
        }
        if body.include_usage:
            made["usage"] = None
        return made

    async with aclosing(choices.pieces()) as pieces:
        async for piece in pieces:
            if isinstance(piece.event, PromptProgress) and piece.index == 0:
                made = chunk(_choice(piece, {}))
                made["prompt_progress"] = prompt_figures(piece.event)
                yield frame(made)
            for choice in _chunk_choices(piece):
                yield frame(chunk(choice))
    if body.include_usage:
        last = chunk()
        last["usage"] = choices.used.to_usage()
        yield frame(last)


def _chunk_choices(piece: ChatPiece) -> list[ChatChunkChoice]:
    """The chunks for a piece, one for each thing that it adds."""
    if isinstance(piece.event, Started):
        return [_choice(piece, {"role": "assistant", "content": ""})]
    told = [_choice(piece, _delta(delta)) for delta in piece.deltas]
    if piece.finish_reason is not None:
        told.append(_choice(piece, {}, piece.finish_reason))
    if piece.logprobs:
        told[0]["logprobs"] = chat_logprobs(piece.logprobs)
    return told


def _choice(piece: ChatPiece, delta: Delta, finish: FinishReason | None = None) -> ChatChunkChoice:
    return {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _delta(delta: deltas.Delta) -> Delta:
    match delta:
        case deltas.ContentDelta(text):
            return {"content": text}
        case deltas.ReasoningDelta(text):
            return {"reasoning_content": text}
        case deltas.ToolCallDelta(index, call_id, name, arguments):
            function: CalledFunctionDelta = {"arguments": arguments}
            if name is not None:
                function = {"name": name, "arguments": arguments}
            call: ToolCallDelta = {"index": index, "function": function}
            if call_id is not None:
                call["id"], call["type"] = call_id, "function"
            return {"tool_calls": [call]}


@dataclass(slots=True)
class _Whole:
    """One choice, collected from its pieces."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, AnswerToolCall] = field(default_factory=dict)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason = "stop"

    def add(self, pieces: Sequence[deltas.Delta]) -> None:
        for delta in pieces:
            match delta:
                case deltas.ContentDelta(text):
                    self.content.append(text)
                case deltas.ReasoningDelta(text):
                    self.reasoning.append(text)
                case deltas.ToolCallDelta(index, call_id, name, arguments):
                    if index not in self.calls:
                        function: CalledFunction = {"name": name or "", "arguments": ""}
                        self.calls[index] = {"id": call_id or "", "type": "function", "function": function}
                    self.calls[index]["function"]["arguments"] += arguments

    def message(self) -> AnswerMessage:
        content = "".join(self.content)
        message: AnswerMessage = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["content"] = content or None
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
        return message


async def whole_chat(choices: ChatChoices, body: ChatBody, response_id: str, model: str) -> ChatCompletion:
    """The answer to a chat completion that is not streamed. The arguments are those of :func:`chat_frames`.

    Raises:
        RbeeError: a choice failed.
    """
    created = int(time.time())
    wholes = [_Whole() for _ in range(body.n)]
    async with aclosing(choices.pieces()) as pieces:
        async for piece in pieces:
            whole = wholes[piece.index]
            whole.add(piece.deltas)
            whole.logprobs += piece.logprobs
            whole.finish = piece.finish_reason or whole.finish
    return {
        "id": response_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                "message": whole.message(),
                "logprobs": chat_logprobs(whole.logprobs) if body.logprobs else None,
                "finish_reason": whole.finish,
            }
            for index, whole in enumerate(wholes)
        ],
        "usage": choices.used.to_usage(),
    }
