"""The body of a chat completion: messages, tools and other fields that only a conversation has."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from rbee_worker.config import Message
from rbee_worker.errors import FieldError
from rbee_worker.server.bodies import within
from rbee_worker.server.http.fields import KIND, Body, Many, NonEmptyText, Shown, Text, broken
from rbee_worker.server.openai.bodies import OpenAIBody, Variables
from rbee_worker.server.openai.refusals import EVERYWHERE, OF_CHAT, refused
from rbee_worker.server.openai.tools import Function, FunctionCall

_OTHER_PARTS: Final = frozenset(
    {"image_url", "image", "input_image", "input_audio", "audio_url", "video_url", "file", "refusal"}
)


def _part(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in _OTHER_PARTS:
        raise broken(f"text: this worker reads no {kind}")
    return value


class TextPart(Body):
    """A part of a message's content."""

    type: Annotated[Literal["text"], KIND]
    text: Annotated[Text, Field(description="The text.")]


class ToolCall(Body):
    """A tool call of an earlier answer."""

    id: Annotated[Text | None, Field(description="The id of the call.")] = None
    type: Annotated[Literal["function"], KIND] = "function"
    function: Annotated[FunctionCall, Field(description="The function.")]


def _content_form(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Many[Annotated[TextPart, BeforeValidator(_part)]], Tag("<parts>")],
    Discriminator(_content_form),
]


class MessageBody(Body):
    """One message; which roles there are is the chat template's business."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
                {
                    "required": ["role", "tool_calls"],
                    "properties": {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}},
                },
            ]
        }
    )

    role: Annotated[NonEmptyText, Field(description="Which roles there are is the chat template's business.")]
    content: Annotated[
        Content | None,
        Field(description="A text, or parts of type `text`; required, save in an assistant's `tool_calls`."),
    ] = None
    name: Annotated[Text | None, Field(description="Who speaks, for chat templates that know it.")] = None
    reasoning_content: Annotated[
        Text | None, Field(description="An earlier answer's reasoning, for chat templates that know it.")
    ] = None
    tool_calls: Annotated[Many[ToolCall] | None, Field(description="Those of an earlier answer.")] = None
    tool_call_id: Annotated[Text | None, Field(description="The call that a tool's message answers.")] = None

    @property
    def text(self) -> str:
        """The content as one text; parts are joined by line breaks."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def to_message(self) -> Message:
        """The message for a chat template. The arguments of tool calls are still JSON text."""
        message = Message(role=self.role, content=self.text)
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return message


class ToolBody(Body):
    """One of ``tools``."""

    type: Annotated[Literal["function"], KIND]
    function: Annotated[Function, Field(description="The function.")]


class FunctionName(Body):
    """The function that must be called."""

    name: Annotated[NonEmptyText, Field(description="The name of the function.")]


class NamedTool(Body):
    """``tool_choice`` that names a function."""

    type: Annotated[Literal["function"], KIND]
    function: Annotated[FunctionName, Field(description="The function.")]


def _choice_form(value: Any) -> str:
    return "<named>" if isinstance(value, dict) else "<word>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedTool, Tag("<named>")],
    Discriminator(_choice_form),
]


def _messages(value: list[MessageBody]) -> list[MessageBody]:
    if not value:
        raise broken("at least 1 message")
    return value


class ChatBody(OpenAIBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[
        Many[MessageBody],
        AfterValidator(_messages),
        Shown({"minItems": 1}),
        Field(description="The conversation so far."),
    ]
    max_completion_tokens: Annotated[
        Annotated[int, within("max_tokens")] | None, Field(description="Goes before `max_tokens`.")
    ] = None
    logprobs: Annotated[bool, Field(description="Tell each token's log-probability.")] = False
    top_logprobs: Annotated[
        Annotated[int, within("logprobs")] | None,
        Field(description="How many of the likeliest tokens to tell with each; with `logprobs` only."),
    ] = None
    tools: Annotated[Many[ToolBody] | None, Field(description="Functions that the model may call.")] = None
    tool_choice: Annotated[
        ToolChoice | None,
        Field(description="Whether they may or must be called, or the one that must; `auto` by default."),
    ] = None
    parallel_tool_calls: Annotated[bool, Field(description="Allow several calls in one answer.")] = True
    documents: Annotated[Many[dict[str, Any]] | None, Field(description="For chat templates that know them.")] = None
    chat_template_kwargs: Annotated[Variables | None, Field(description="Further values for the chat template.")] = None
    reasoning_effort: Annotated[
        Text | None, Field(description="For chat templates that know it; `none` also says `enable_thinking` false.")
    ] = None

    @classmethod
    def _across_fields(cls, body: Mapping[str, Any]) -> Iterable[FieldError]:
        yield from refused(body, EVERYWHERE, OF_CHAT)
        if body.get("top_logprobs") not in (None, 0) and not body.get("logprobs"):
            yield FieldError("top_logprobs", "with logprobs", "top_logprobs must be given with logprobs.")
        messages = body.get("messages")
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            yield from _across_message(message, f"messages[{index}]")
        yield from _across_tools(body)

    @property
    def told_logprobs(self) -> int | None:
        """How many of the likeliest tokens to list with each token. None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _across_message(message: Any, where: str) -> Iterable[FieldError]:
    if not isinstance(message, dict):
        return
    if message.get("content") is None and not (message.get("role") == "assistant" and message.get("tool_calls")):
        yield FieldError(f"{where}.content", "required", f"{where}.content is required.")
    for name in ("function_call", "audio"):
        if message.get(name) is not None:
            yield FieldError(f"{where}.{name}", "not supported", f"{where}.{name} is not supported.")


def _across_tools(body: Mapping[str, Any]) -> Iterable[FieldError]:
    choice, tools = body.get("tool_choice"), body.get("tools")
    if choice not in (None, "none", "auto") and not tools:
        yield FieldError("tool_choice", "given with tools", "tool_choice must be given with tools.")
    if not isinstance(choice, dict) or not isinstance(tools, list) or not tools:
        return
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    wanted = choice.get("function")
    if isinstance(wanted, dict) and isinstance(wanted.get("name"), str) and wanted["name"] not in names:
        constraint = "the name of one of tools"
        message = f"tool_choice.function.name must be {constraint}."
        yield FieldError("tool_choice.function.name", constraint, message)
