"""What request bodies must look like; each bad field is reported, its value never is.

Types are strict: ``"1"`` is no number, ``true`` is no integer, an integer will do for a float. ``null`` means absent.
Keys that are not named here are ignored, so that clients of newer workers are served. Ranges and defaults are those
of ``rbee_worker.config``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from rbee_worker.config import (
    MAX_JOB_ID_LENGTH,
    MAX_STOP_SEQUENCES,
    RANGES,
    SEED_MAX,
    SEED_MIN,
    DTypeName,
    GenerationRequest,
    Message,
    Quantization,
    SamplingParams,
)
from rbee_worker.errors import FieldError, InvalidRequest

_MAX_REPORTED = 100
_DEFAULTS = SamplingParams()
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?|mps")

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


def _broken(constraint: str) -> PydanticCustomError:
    return PydanticCustomError("constraint", "{constraint}", {"constraint": constraint})


def _within(name: str) -> AfterValidator:
    def check(value: float) -> float:
        if value not in RANGES[name]:
            raise _broken(str(RANGES[name]))
        return value

    return AfterValidator(check)


def _seed(value: int) -> int:
    if not SEED_MIN <= value <= SEED_MAX:
        raise _broken("64-bit integer")
    return value


def _unicode(value: str) -> str:
    # JSON can spell half of a surrogate pair; no tokenizer can read one.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _broken("valid Unicode") from None
    return value


def _not_empty(value: str) -> str:
    if not value:
        raise _broken("at least 1 character")
    return value


def _job_id(value: str) -> str:
    if not (1 <= len(value) <= MAX_JOB_ID_LENGTH and value.isprintable()):
        raise _broken(f"1 to {MAX_JOB_ID_LENGTH} printable characters")
    return value


def _stop_list(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _broken("string or list of strings")
    if len(value) > MAX_STOP_SEQUENCES:
        raise _broken(f"at most {MAX_STOP_SEQUENCES} strings")
    return value


def _messages(value: "list[ChatMessage]") -> "list[ChatMessage]":
    if not value:
        raise _broken("at least 1 message")
    return value


def _device(value: str) -> str:
    if not _DEVICE.fullmatch(value):
        raise _broken("auto, cpu, cuda, cuda:N or mps")
    return value


def _token_id(value: int) -> int:
    if not 0 <= value < 2**32:
        raise _broken("token id: 0 to 4294967295")
    return value


Text = Annotated[str, AfterValidator(_unicode)]
NonEmptyText = Annotated[Text, AfterValidator(_not_empty)]


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
        problems = list(cls._across_fields(body))
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


class ChatMessage(Body):
    """One message of a conversation; which roles there are is the chat template's business."""

    role: NonEmptyText
    content: Text


class InferenceBody(Body):
    """``POST /v1/inference``."""

    prompt: NonEmptyText | None = None
    messages: Annotated[list[ChatMessage], AfterValidator(_messages)] | None = None
    job_id: Annotated[Text, AfterValidator(_job_id)] | None = None
    max_tokens: Annotated[int, _within("max_tokens")] | None = _DEFAULTS.max_tokens
    temperature: Annotated[float, _within("temperature")] = _DEFAULTS.temperature
    top_p: Annotated[float, _within("top_p")] = _DEFAULTS.top_p
    top_k: Annotated[int, _within("top_k")] = _DEFAULTS.top_k
    min_p: Annotated[float, _within("min_p")] = _DEFAULTS.min_p
    repetition_penalty: Annotated[float, _within("repetition_penalty")] = _DEFAULTS.repetition_penalty
    presence_penalty: Annotated[float, _within("presence_penalty")] = _DEFAULTS.presence_penalty
    frequency_penalty: Annotated[float, _within("frequency_penalty")] = _DEFAULTS.frequency_penalty
    seed: Annotated[int, AfterValidator(_seed)] | None = _DEFAULTS.seed
    stop: Annotated[list[NonEmptyText], BeforeValidator(_stop_list)] = []
    ignore_eos: bool = _DEFAULTS.ignore_eos

    @classmethod
    def _across_fields(cls, body: Mapping[str, Any]) -> Iterable[FieldError]:
        given = [name for name in ("prompt", "messages") if body.get(name) is not None]
        if not given:
            yield FieldError("prompt", "required, unless messages", "prompt is required, unless messages is given.")
        elif len(given) > 1:
            yield FieldError("messages", "not together with prompt", "messages must not be given together with prompt.")

    def to_request(self) -> GenerationRequest:
        """What the engine is asked for; ``prompt`` is taken as it is, ``messages`` go through the chat template."""
        messages = tuple(Message(role=m.role, content=m.content) for m in self.messages) if self.messages else None
        return GenerationRequest(
            prompt=self.prompt,
            messages=messages,
            raw=messages is None,
            job_id=self.job_id,
            sampling=SamplingParams(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                seed=self.seed,
                stop=tuple(self.stop),
                ignore_eos=self.ignore_eos,
            ),
        )


class LoadingBody(Body):
    """``POST /v1/loading``; without ``model``: the one given at start."""

    model: NonEmptyText | None = None
    device: Annotated[NonEmptyText, AfterValidator(_device)] | None = None
    dtype: DTypeName | None = None
    quantize: Quantization | None = None


class TokenizeBody(Body):
    """``POST /tokenize``; ``add_special`` adds what the tokenizer puts around a prompt, such as a BOS token."""

    text: Text
    add_special: bool = False


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    tokens: Annotated[list[Annotated[int, AfterValidator(_token_id)]], FailFast()]


def _field_error(error: ErrorDetails) -> FieldError:
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    context = error.get("ctx", {})
    if "constraint" in context:
        constraint = str(context["constraint"])
    elif "expected" in context:
        constraint = f"one of {context['expected']}"
    else:
        constraint = _CONSTRAINTS.get(error["type"], error["type"])
    sentence = f"{name} is required." if constraint == "required" else f"{name} must be {constraint}."
    return FieldError(name, constraint, sentence)
