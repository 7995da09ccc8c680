"""The parts of request bodies: types of fields, and ``Body``, the base class that names each bad field.

Types are strict: ``"1"`` is not a number, and ``true`` is not an integer; but an integer may stand for a float.
``null`` means absent. Unknown keys are ignored, so that clients of newer workers are served. No message repeats a
value.
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
"""The first character of the names of a union's members. They are left out of the names of fields."""

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
"""pydantic's type of error -> constraint. Used if the error's context has neither ``constraint`` nor ``expected``."""


def broken(constraint: str) -> PydanticCustomError:
    """The error for a validator to raise. Its message says that the field "must be ``constraint``"."""
    return PydanticCustomError("constraint", "{constraint}", {"constraint": constraint})


@dataclass(frozen=True, slots=True)
class Within:
    """Annotation: the number must lie in a range. The JSON schema has the range too."""

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
    """Annotation: adds keywords to the JSON schema, which describe what a validator beside it checks."""

    keywords: Mapping[str, Any]

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | dict(self.keywords)


@dataclass(frozen=True, slots=True)
class _FirstBad:
    """As pydantic's ``FailFast``, but hashable, which members of a union must be."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if schema["type"] == "list":
            cast("dict[str, Any]", schema)["fail_fast"] = True
        return schema


def _unicode(value: str) -> str:
    # JSON can contain half of a surrogate pair, but no tokenizer can read that.
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
"""A list that clients may make long. Only its first bad item is named.

To name millions of bad items would block the process for many seconds.
"""

KIND: Final = Field(description="Which kind of part, item, tool or format this is.")
"""The description of a field ``type``."""

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
        """Validate a body.

        Raises:
            InvalidRequest: there are bad fields; it lists the first hundred.
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
        """Problems that concern several fields together."""
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
