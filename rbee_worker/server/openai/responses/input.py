"""The input of a response, a text or items, and how it becomes messages."""

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from rbee_worker.config import Message
from rbee_worker.server.http.fields import KIND, Body, Many, NonEmptyText, Shown, Text, broken
from rbee_worker.server.openai.tools import FunctionCall

_OTHER_PARTS: Final = frozenset(
    {"input_image", "input_file", "input_audio", "refusal", "image_url", "computer_screenshot"}
)
_OTHER_ITEMS: Final = frozenset(
    {"apply_patch_call", "apply_patch_call_output", "code_interpreter_call", "compaction", "computer_call"}
    | {"computer_call_output", "custom_tool_call", "custom_tool_call_output", "file_search_call"}
    | {"image_generation_call", "local_shell_call", "local_shell_call_output", "mcp_approval_request"}
    | {"mcp_approval_response", "mcp_call", "mcp_list_tools", "shell_call", "shell_call_output", "web_search_call"}
)


def _part(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in _OTHER_PARTS:
        raise broken(f"text: this worker reads no {kind}")
    return value


class InputPart(Body):
    """A part of a message's content, of a client or of an earlier answer."""

    type: Annotated[Literal["input_text", "output_text", "text"], KIND]
    text: Annotated[Text, Field(description="The text.")]


def _content_form(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Many[Annotated[InputPart, BeforeValidator(_part)]], Tag("<parts>")],
    Discriminator(_content_form),
]


def _text(content: str | list[InputPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class MessageItem(Body):
    """A message, also one of an earlier answer."""

    type: Annotated[Literal["message"], KIND] = "message"
    role: Annotated[Literal["user", "assistant", "system", "developer"], Field(description="Who speaks.")]
    content: Annotated[Content, Field(description="A text, or parts of it.")]


class FunctionCallItem(FunctionCall):
    """A tool call of an earlier answer."""

    type: Annotated[Literal["function_call"], KIND]
    call_id: Annotated[NonEmptyText, Field(description="The id of the call that this is, or that this answers.")]

    def to_call(self) -> dict[str, Any]:
        """The call in the form of messages."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class FunctionCallOutputItem(Body):
    """What a tool call gave."""

    type: Annotated[Literal["function_call_output"], KIND]
    call_id: Annotated[NonEmptyText, Field(description="The id of the call that this is, or that this answers.")]
    output: Annotated[Content, Field(description="What the call gave.")]


class ReasoningPart(Body):
    """A part of the reasoning, or of its summary."""

    type: Annotated[Literal["reasoning_text", "summary_text"], KIND]
    text: Annotated[Text, Field(description="The text.")]


class ReasoningItem(Body):
    """The reasoning of an earlier answer; ``encrypted_content`` is somebody else's, and left alone."""

    type: Annotated[Literal["reasoning"], KIND]
    content: Annotated[Many[ReasoningPart] | None, Field(description="The reasoning.")] = None
    summary: Annotated[Many[ReasoningPart] | None, Field(description="Taken where there is no `content`.")] = None

    @property
    def text(self) -> str:
        """The reasoning; without it, its summary."""
        return "\n".join(part.text for part in self.content or self.summary or ())


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem
_KINDS: Final = ("message", "function_call", "function_call_output", "reasoning")


def _kind(value: Any) -> str:
    """The type of an item. Messages and references may leave it out."""
    if isinstance(value, Body):
        return str(getattr(value, "type", ""))
    if not isinstance(value, dict):
        return ""
    kind = value.get("type")
    if kind is None:
        return "message" if "role" in value else "item_reference"
    return kind if isinstance(kind, str) else ""


def _item(value: Any) -> Any:
    kind = _kind(value)
    if kind == "item_reference":
        raise broken("the item itself, not a reference to it: this worker keeps no items")
    if kind not in _KINDS:
        other = f": this worker knows no {kind}" if kind in _OTHER_ITEMS else ""
        raise broken(f"a message, function_call, function_call_output or reasoning{other}")
    return value


def _not_empty(value: list[Any]) -> list[Any]:
    if not value:
        raise broken("not empty")
    return value


_TaggedItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(lambda value: f"<{_kind(value)}>"),
]
_ONE: Final = Shown({"minItems": 1})
Input = Annotated[
    Annotated[NonEmptyText, Tag("<text>")]
    | Annotated[Many[Annotated[_TaggedItem, BeforeValidator(_item)]], AfterValidator(_not_empty), _ONE, Tag("<items>")],
    Discriminator(lambda value: "<items>" if isinstance(value, list) else "<text>"),
]


def to_messages(given: str | list[Item], instructions: str | None) -> tuple[Message, ...]:
    """The messages of an input. ``instructions`` are put at the start of the system message, or become one."""
    messages = [Message(role="user", content=given)] if isinstance(given, str) else _Messages(given).messages
    if not instructions:
        return tuple(messages)
    first = messages[0]
    if first["role"] not in {"system", "developer"}:
        return (Message(role="system", content=instructions), *messages)
    return ({**first, "content": f"{instructions}\n\n{first['content']}"}, *messages[1:])


class _Messages:
    """Makes messages from items. The items of one answer (reasoning, text, calls) become one message."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.messages: list[Message] = []
        self._answer: Message | None = None
        for item in items:
            self._add(item)

    def _add(self, item: Item) -> None:
        match item:
            case ReasoningItem():
                answer = self._answer_without("content", "tool_calls")
                said = answer.get("reasoning_content")
                answer["reasoning_content"] = f"{said}\n{item.text}" if said else item.text
            case FunctionCallItem():
                self._answer_without().setdefault("tool_calls", []).append(item.to_call())
            case MessageItem(role="assistant"):
                called = self._answer is not None and "tool_calls" in self._answer
                answer = self._answer_without() if called else self._answer_without("content")
                answer["content"] = "\n\n".join(filter(None, (answer["content"], _text(item.content))))
            case MessageItem():
                self._other(Message(role=item.role, content=_text(item.content)))
            case FunctionCallOutputItem():
                self._other(Message(role="tool", content=_text(item.output), tool_call_id=item.call_id))

    def _answer_without(self, *keys: Literal["content", "tool_calls"]) -> Message:
        """The current message of the assistant; a new one, if the current one already has one of ``keys``."""
        if self._answer is None or any(self._answer.get(key) for key in keys):
            self._answer = Message(role="assistant", content="")
            self.messages.append(self._answer)
        return self._answer

    def _other(self, message: Message) -> None:
        self._answer = None
        self.messages.append(message)
