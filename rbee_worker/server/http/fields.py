"""The parts that request bodies are made of: types of fields, and the base that names each bad one.

Types are strict: ``"1"`` is no number, ``true`` is no integer, an integer will do for a float. ``null`` means absent.
Keys that no field names are ignored, so that clients of newer workers are served. No value is ever repeated.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Final, Self, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from rbee_worker.config import Range
from rbee_worker.errors import FieldError, InvalidRequest

T = TypeVar("T")

_MAX_REPORTED = 100
_TAG = "<"
"""Begins the names of a union's members, which are no part of a field's name."""

_CONSTRAINTS: Mapping[str, str] = {
    "missing": "required",
    "bool_type": "boolean",
    "int_type": "integer",
    "float_type": "number",
    "finite_number": "finite number",
    "string_type": "string",
    "list_type": "list",
    "model_type": "object",
    "model_attributes_type": "object",
}
"""Constraint by pydantic's type of error, where neither ``constraint`` nor ``expected`` is in its context."""


def broken(constraint: str) -> PydanticCustomError:
    """What a validator raises: the field "must be ``constraint``"."""
    return PydanticCustomError("constraint", "{constraint}", {"constraint": constraint})


@dataclass(frozen=True, slots=True)
class Within:
    """Annotates a number that must lie in a range, in its JSON schema too."""

    bounds: Range

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        limits = {
            "minimum": self.bounds.low,
            "exclusiveMinimum": self.bounds.above,
            "maximum": self.bounds.high,
        }
        return handler(schema) | {key: limit for key, limit in limits.items() if limit is not None}

    def _check(self, value: float) -> float:
        if value not in self.bounds:
            raise broken(str(self.bounds))
        return value


@dataclass(frozen=True, eq=False, slots=True)
class Shown:
    """Annotates a type with keywords that say in its JSON schema what a validator beside it checks."""

    keywords: Mapping[str, Any]

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | dict(self.keywords)


@dataclass(frozen=True, slots=True)
class _FirstBad:
    """pydantic's ``FailFast``, which cannot be hashed and so not be part of a union."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if schema["type"] == "list":
            cast("dict[str, Any]", schema)["fail_fast"] = True
        return schema


def _unicode(value: str) -> str:
    # JSON can spell half of a surrogate pair; no tokenizer can read one.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise broken("valid Unicode") from None
    return value


def _not_empty(value: str) -> str:
    if not value:
        raise broken("at least 1 character")
    return value


def _token_id(value: int) -> int:
    if not 0 <= value < 2**32:
        raise broken("token id: 0 to 4294967295")
    return value


Many = Annotated[list[T], _FirstBad()]
"""A list that clients may make long: only its first bad item is named.

To name millions of them would take many seconds, in which nothing else happens in the process.
"""

KIND: Final = Field(description="Which kind of part, item, tool or format this is.")
"""Describes the field ``type``."""

Text = Annotated[str, AfterValidator(_unicode)]
NonEmptyText = Annotated[Text, AfterValidator(_not_empty), Shown({"minLength": 1})]
TokenId = Annotated[int, AfterValidator(_token_id), Shown({"minimum": 0, "maximum": 2**32 - 1})]


class Body(BaseModel):
    """Base of the request bodies."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Self:
        """The request in ``body``.

        Raises:
            InvalidRequest: listing every bad field.
        """
        problems = list(islice(cls._across_fields(body), _MAX_REPORTED))
        try:
            parsed = cls.model_validate(body)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)
            problems = [*map(_field_error, details[:_MAX_REPORTED]), *problems]
        if problems:
            raise InvalidRequest(" ".join(problem.message for problem in problems), fields=problems)
        return parsed

    @classmethod
    def _across_fields(cls, _body: Mapping[str, Any]) -> Iterable[FieldError]:
        """What is wrong beyond single fields."""
        return ()


def _field_error(error: ErrorDetails) -> FieldError:
    parts = [part for part in error["loc"] if not str(part).startswith(_TAG)]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    context = error.get("ctx", {})
    if "constraint" in context:
        constraint = str(context["constraint"])
    elif "expected" in context:
        constraint = f"one of {context['expected']}"
    else:
        constraint = _CONSTRAINTS.get(error["type"], error["type"])
    sentence = f"{name} is required." if constraint == "required" else f"{name} must be {constraint}."
    return FieldError(name, constraint, sentence)
