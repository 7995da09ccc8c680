"""The body of a response."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from rbee_worker.config import GrammarSpec
from rbee_worker.errors import FieldError, InvalidRequest
from rbee_worker.server.bodies import SamplingFields, schema_grammar, within
from rbee_worker.server.http.fields import KIND, Body, Many, NonEmptyText, Shown, Text, broken
from rbee_worker.server.openai.bodies import MODEL, Variables
from rbee_worker.server.openai.refusals import EVERYWHERE, OF_RESPONSES, refused
from rbee_worker.server.openai.responses.input import Input
from rbee_worker.server.openai.tools import Function

_MAX_METADATA: Final = 16
_LOGPROBS: Final = "message.output_text.logprobs"
_BUILT_IN_TOOLS: Final = frozenset(
    {"apply_patch", "code_interpreter", "computer", "computer_use_preview", "custom", "file_search"}
    | {"image_generation", "local_shell", "mcp", "namespace", "shell", "tool_search", "web_search"}
    | {"web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"}
)


Repeated = Annotated[Text | None, Field(description="Repeated in the answer.")]


class TextFormat(Body):
    """``text.format``; the text matches the schema whether or not ``strict`` is said."""

    type: Annotated[Literal["text", "json_object", "json_schema"], KIND]
    name: Repeated = None
    description: Repeated = None
    json_schema: Annotated[
        dict[str, Any] | None,
        Field(
            validation_alias="schema",
            serialization_alias="schema",
            description="A JSON schema, for the type `json_schema`.",
        ),
    ] = None
    strict: Annotated[bool | None, Field(description="Repeated in the answer: the text always matches.")] = None

    def to_grammar(self) -> GrammarSpec | None:
        """The grammar that the text must match; None: any text.

        Raises:
            InvalidRequest: the schema is missing or nested too deeply.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return GrammarSpec("json_object")
        if self.json_schema is None:
            field = FieldError("text.format.schema", "required", "text.format.schema is required.")
            raise InvalidRequest(field.message, fields=[field])
        return schema_grammar(self.json_schema)

    def to_dict(self) -> dict[str, Any]:
        """The form in which responses repeat it."""
        told = self.model_dump(by_alias=True, exclude_none=True)
        return {"name": "response"} | told if self.type == "json_schema" else {"type": self.type}


class TextConfig(Body):
    """``text``."""

    format: Annotated[TextFormat, Field(description="What the text must be.")] = TextFormat(type="text")


class Reasoning(Body):
    """``reasoning``; no summaries are made, so ``summary`` is only repeated."""

    effort: Annotated[Text | None, Field(description="As `reasoning_effort` of chat completions.")] = None
    summary: Annotated[Text | None, Field(description="Repeated in the answer: no summaries are made.")] = None


def _tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in _BUILT_IN_TOOLS:
        raise broken(f"a function: this worker has no {kind}")
    return value


class FunctionTool(Function):
    """One of ``tools``."""

    type: Annotated[Literal["function"], KIND]

    def to_tool(self) -> dict[str, Any]:
        """The tool in the form of chat completions."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}

    def to_dict(self) -> dict[str, Any]:
        """The form in which responses repeat it."""
        told = {"description": self.description, "parameters": self.parameters, "strict": bool(self.strict)}
        return {"type": "function", "name": self.name} | told


class NamedFunction(Body):
    """The function that must be called, or one that may be."""

    type: Annotated[Literal["function"], KIND]
    name: Annotated[NonEmptyText, Field(description="The name of the function.")]


class AllowedTools(Body):
    """Those of ``tools`` that may be called, or of which one must be."""

    type: Annotated[Literal["allowed_tools"], KIND]
    mode: Annotated[Literal["auto", "required"], Field(description="Whether one of them must be called.")]
    tools: Annotated[Many[NamedFunction], Field(description="Those that may be called.")]


def _choice_form(value: Any) -> str:
    if not isinstance(value, dict):
        return "<word>"
    return "<allowed>" if value.get("type") == "allowed_tools" else "<named>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedFunction, Tag("<named>")]
    | Annotated[AllowedTools, Tag("<allowed>")],
    Discriminator(_choice_form),
]


def _metadata(value: Any) -> Any:
    # Runs before each entry is checked.
    if isinstance(value, dict) and len(value) > _MAX_METADATA:
        raise broken(f"at most {_MAX_METADATA} entries")
    return value


Metadata = Annotated[dict[str, Text], BeforeValidator(_metadata), Shown({"maxProperties": _MAX_METADATA})]


class ResponsesBody(SamplingFields):
    """``POST /v1/responses``."""

    model: Annotated[Text | None, MODEL] = None
    input: Annotated[Input, Field(description="A text, or the conversation so far as items.")]
    instructions: Annotated[Text | None, Field(description="Put before the system message.")] = None
    max_tokens: Annotated[
        Annotated[int, within("max_tokens")] | None,
        Field(
            validation_alias="max_output_tokens",
            serialization_alias="max_output_tokens",
            description="Tokens to generate at most; by default what is left of the context.",
        ),
    ] = None
    stream: Annotated[bool, Field(description="Send the answer as it is made.")] = False
    stream_options: Annotated[dict[str, Any] | None, Field(description="Not looked at.")] = None
    text: Annotated[TextConfig, Field(description="What the text must be.")] = TextConfig()
    tools: Annotated[
        Many[Annotated[FunctionTool, BeforeValidator(_tool)]] | None,
        Field(description="Functions that the model may call."),
    ] = None
    tool_choice: Annotated[
        ToolChoice, Field(description="Whether they may or must be called, or the one that must; `auto` by default.")
    ] = "auto"
    parallel_tool_calls: Annotated[bool, Field(description="Allow several calls in one answer.")] = True
    max_tool_calls: Annotated[int | None, Field(description="Repeated in the answer, and not looked at.")] = None
    reasoning: Annotated[Reasoning, Field(description="How much to think.")] = Reasoning()
    include: Annotated[
        Many[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None,
        Field(description="`message.output_text.logprobs` tells each token's log-probability."),
    ] = None
    top_logprobs: Annotated[
        int, within("logprobs"), Field(description="How many of the likeliest tokens to tell with each.")
    ] = 0
    store: Annotated[bool, Field(description="Not looked at: nothing is kept.")] = True
    metadata: Annotated[Metadata | None, Field(description="Repeated in the answer; at most 16 entries.")] = None
    user: Repeated = None
    safety_identifier: Repeated = None
    prompt_cache_key: Repeated = None
    chat_template_kwargs: Annotated[Variables | None, Field(description="Further values for the chat template.")] = None

    @classmethod
    def _across_fields(cls, body: Mapping[str, Any]) -> Iterable[FieldError]:
        yield from refused(body, EVERYWHERE, OF_RESPONSES)
        text = body.get("text")
        if isinstance(text, dict) and text.get("verbosity") not in (None, "medium"):
            yield FieldError("text.verbosity", "not supported", "text.verbosity is not supported.")
        yield from _across_tools(body.get("tool_choice"), body.get("tools"))

    @property
    def told_logprobs(self) -> int | None:
        """How many of the likeliest tokens to list with each token. None: no log-probabilities at all."""
        return self.top_logprobs if self.top_logprobs or _LOGPROBS in (self.include or ()) else None

    @property
    def usable_tools(self) -> list[FunctionTool]:
        """The tools that ``tool_choice`` allows."""
        tools = self.tools or []
        if not isinstance(self.tool_choice, AllowedTools):
            return tools
        allowed = {tool.name for tool in self.tool_choice.tools}
        return [tool for tool in tools if tool.name in allowed]

    def grammars(self) -> Iterable[tuple[str, GrammarSpec]]:
        """See the base class. Adds OpenAI's field."""
        yield from super().grammars()
        if (grammar := self.text.format.to_grammar()) is not None:
            yield "text.format", grammar


def _across_tools(choice: Any, tools: Any) -> Iterable[FieldError]:
    if choice not in (None, "none", "auto") and not tools:
        yield FieldError("tool_choice", "given with tools", "tool_choice must be given with tools.")
    if not isinstance(choice, dict) or not isinstance(tools, list) or not tools:
        return
    names = [tool.get("name") for tool in tools if isinstance(tool, dict)]
    if choice.get("type") == "allowed_tools" and choice.get("tools") == []:
        yield FieldError("tool_choice.tools", "not empty", "tool_choice.tools must be not empty.")
    for field, name in _chosen(choice):
        if isinstance(name, str) and name not in names:
            yield FieldError(field, "the name of one of tools", f"{field} must be the name of one of tools.")


def _chosen(choice: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Pairs of field and name, for each name in a ``tool_choice``."""
    if choice.get("type") == "function":
        yield "tool_choice.name", choice.get("name")
    allowed = choice.get("tools") if choice.get("type") == "allowed_tools" else None
    for index, tool in enumerate(allowed if isinstance(allowed, list) else ()):
        if isinstance(tool, dict):
            yield f"tool_choice.tools[{index}].name", tool.get("name")
