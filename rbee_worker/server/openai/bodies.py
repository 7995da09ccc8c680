"""The fields that the bodies of OpenAI's routes share."""

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, AliasChoices, Discriminator, Field, Tag

from rbee_worker.config import CHOICES_RANGE, GrammarSpec
from rbee_worker.errors import FieldError, InvalidRequest
from rbee_worker.server.bodies import SamplingFields, only_grammar, schema_grammar
from rbee_worker.server.http.fields import Body, Many, NonEmptyText, Shown, Text, Within, broken

_RESERVED_VARIABLES: Final = frozenset({"self", "messages", "tools", "documents", "add_generation_prompt"})
_METACHARACTERS = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")


def _variables(value: dict[str, Any]) -> dict[str, Any]:
    if not _RESERVED_VARIABLES.isdisjoint(value):
        raise broken(f"without {', '.join(sorted(_RESERVED_VARIABLES))}")
    return value


Variables = Annotated[
    dict[str, Any],
    AfterValidator(_variables),
    Shown({"propertyNames": {"not": {"enum": sorted(_RESERVED_VARIABLES)}}}),
]


MODEL: Final = Field(
    description="The model's name, what it was loaded by, or a `--served-model-name`; by default the one that serves."
)
"""The description of the field ``model``."""


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: Annotated[bool, Field(description="One chunk more, without choices, with the usage.")] = False


class JsonSchemaFormat(Body):
    """``response_format.json_schema``; the text matches the schema whether or not ``strict`` is said."""

    name: Annotated[Text | None, Field(description="Not looked at.")] = None
    json_schema: Annotated[
        dict[str, Any],
        Field(
            validation_alias="schema",
            serialization_alias="schema",
            description="A JSON schema, for the type `json_schema`.",
        ),
    ]
    strict: Annotated[bool | None, Field(description="Not looked at: the text always matches.")] = None


class ResponseFormat(Body):
    """``response_format``; ``schema`` beside ``json_object`` is how llama.cpp spells a JSON schema."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"],
        Field(description="`json_schema` with a schema, `json_object` for any JSON object."),
    ]
    json_schema: Annotated[JsonSchemaFormat | None, Field(description="For the type `json_schema`.")] = None
    inline_schema: Annotated[
        dict[str, Any] | None,
        Field(
            validation_alias="schema",
            serialization_alias="schema",
            description="The schema itself, as llama.cpp takes it.",
        ),
    ] = None

    def to_grammar(self) -> GrammarSpec | None:
        """The grammar that the text must match; None: any text.

        Raises:
            InvalidRequest: the schema is missing or nested too deeply.
        """
        if self.type == "text":
            return None
        schema = self.json_schema.json_schema if self.json_schema is not None else self.inline_schema
        if schema is not None:
            return schema_grammar(schema)
        if self.type == "json_object":
            return GrammarSpec("json_object")
        field = FieldError("response_format.json_schema", "required", "response_format.json_schema is required.")
        raise InvalidRequest(field.message, fields=[field])


def _choices(value: list[str]) -> list[str]:
    if not value:
        raise broken("at least 1 string")
    return value


Schema = Annotated[
    Annotated[dict[str, Any], Tag("<object>")] | Annotated[NonEmptyText, Tag("<text>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<object>"),
]
Choices = Annotated[Many[NonEmptyText], AfterValidator(_choices), Shown({"minItems": 1})]


class StructuredOutputs(Body):
    """``structured_outputs``, as vLLM has it."""

    schema_: Annotated[
        Schema | None,
        Field(
            validation_alias="json",
            serialization_alias="json",
            description="A JSON schema: an object, or the text of one.",
        ),
    ] = None
    regex: Annotated[NonEmptyText | None, Field(description="A regular expression that the text must match.")] = None
    grammar: Annotated[
        NonEmptyText | None, Field(description="A grammar, in llguidance's dialect of Lark, that the text must match.")
    ] = None
    choice: Annotated[Choices | None, Field(description="The text is one of these strings.")] = None
    json_object: Annotated[bool, Field(description="The text is a JSON object.")] = False


class OpenAIBody(SamplingFields):
    """What completions and chat completions have in common."""

    model: Annotated[Text | None, MODEL] = None
    n: Annotated[
        int, Within(CHOICES_RANGE), Field(description="Answers to each prompt; at most 128 for all prompts together.")
    ] = 1
    stream: Annotated[bool, Field(description="Send the answer as it is made.")] = False
    stream_options: Annotated[StreamOptions | None, Field(description="For streams.")] = None
    response_format: Annotated[ResponseFormat | None, Field(description="What the text must be.")] = None
    structured_outputs: Annotated[
        StructuredOutputs | None, Field(description="vLLM's spelling of what the text must match.")
    ] = None
    guided_json: Annotated[
        Schema | None, Field(description="vLLM's older spelling: a JSON schema, an object or the text of one.")
    ] = None
    guided_regex: Annotated[NonEmptyText | None, Field(description="vLLM's older spelling of `regex`.")] = None
    guided_grammar: Annotated[NonEmptyText | None, Field(description="vLLM's older spelling of `grammar`.")] = None
    guided_choice: Annotated[
        Choices | None, Field(description="vLLM's older spelling: the text is one of these strings.")
    ] = None
    prompt_progress: Annotated[
        bool,
        Field(
            validation_alias=AliasChoices("return_progress", "prompt_progress"),
            description="Also called `prompt_progress`: tell how much of the prompt has been processed; streams only.",
        ),
    ] = False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def grammar_spec(self) -> GrammarSpec | None:
        """The grammar that the text must match; None: any text.

        Raises:
            InvalidRequest: several fields say what the text must match, or a schema is wrong.
        """
        return only_grammar(self.grammars())

    def grammars(self) -> Iterable[tuple[str, GrammarSpec]]:
        """See the base class. Adds OpenAI's field, and vLLM's fields, older and newer ones."""
        yield from super().grammars()
        if self.response_format is not None and (grammar := self.response_format.to_grammar()) is not None:
            yield "response_format", grammar
        outputs = self.structured_outputs or StructuredOutputs()
        if outputs.json_object:
            yield "structured_outputs.json_object", GrammarSpec("json_object")
        yield from _spelled("structured_outputs.", outputs.schema_, outputs.regex, outputs.grammar, outputs.choice)
        yield from _spelled("guided_", self.guided_json, self.guided_regex, self.guided_grammar, self.guided_choice)


def _spelled(
    prefix: str,
    schema: dict[str, Any] | str | None,
    regex: str | None,
    grammar: str | None,
    choice: list[str] | None,
) -> Iterable[tuple[str, GrammarSpec]]:
    """Pairs of name and grammar for vLLM's fields whose names begin with ``prefix``."""
    if schema is not None:
        yield f"{prefix}json", schema_grammar(_schema(f"{prefix}json", schema))
    if regex is not None:
        yield f"{prefix}regex", GrammarSpec("regex", regex)
    if grammar is not None:
        yield f"{prefix}grammar", GrammarSpec("lark", grammar)
    if choice is not None:
        expression = "|".join(_METACHARACTERS.sub(r"\\\g<0>", text) for text in choice)
        yield f"{prefix}choice", GrammarSpec("regex", expression)


def _schema(name: str, schema: dict[str, Any] | str) -> dict[str, Any]:
    """A JSON schema that is given as an object or as text.

    Raises:
        InvalidRequest: it is neither.
    """
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        field = FieldError(name, "a JSON schema", f"{name} must be a JSON schema: an object, or the text of one.")
        raise InvalidRequest(field.message, fields=[field])
    return value
