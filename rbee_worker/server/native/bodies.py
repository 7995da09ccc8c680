"""What request bodies must look like. Ranges and defaults are those of ``rbee_worker.config``."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, Field

from rbee_worker.config import (
    MAX_JOB_ID_LENGTH,
    TIMEOUT_RANGE,
    DTypeName,
    GenerationRequest,
    GrammarKind,
    GrammarSpec,
    Message,
    Quantization,
    SamplingParams,
)
from rbee_worker.errors import FieldError, InvalidRequest
from rbee_worker.server.http.fields import (
    Body,
    LogitBias,
    Many,
    NonEmptyText,
    Seed,
    Shown,
    Stop,
    Text,
    TokenId,
    Within,
    broken,
    within,
)

_DEFAULTS = SamplingParams()
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?|mps")


def _job_id(value: str) -> str:
    if not (1 <= len(value) <= MAX_JOB_ID_LENGTH and value.isprintable()):
        raise broken(f"1 to {MAX_JOB_ID_LENGTH} printable characters")
    return value


def _messages(value: "list[ChatMessage]") -> "list[ChatMessage]":
    if not value:
        raise broken("at least 1 message")
    return value


def _device(value: str) -> str:
    if not _DEVICE.fullmatch(value):
        raise broken("auto, cpu, cuda, cuda:N or mps")
    return value


class ChatMessage(Body):
    """One message of a conversation; which roles there are is the chat template's business."""

    role: NonEmptyText
    content: Text


class SamplingFields(Body):
    """What every request for text may say of how it is made."""

    max_tokens: Annotated[int, within("max_tokens")] | None = _DEFAULTS.max_tokens
    temperature: Annotated[float, within("temperature")] = _DEFAULTS.temperature
    top_p: Annotated[float, within("top_p")] = _DEFAULTS.top_p
    top_k: Annotated[int, within("top_k")] = _DEFAULTS.top_k
    min_p: Annotated[float, within("min_p")] = _DEFAULTS.min_p
    repetition_penalty: Annotated[float, within("repetition_penalty")] = _DEFAULTS.repetition_penalty
    presence_penalty: Annotated[float, within("presence_penalty")] = _DEFAULTS.presence_penalty
    frequency_penalty: Annotated[float, within("frequency_penalty")] = _DEFAULTS.frequency_penalty
    seed: Seed | None = _DEFAULTS.seed
    stop: Annotated[Stop, Field(default_factory=list)]
    ignore_eos: bool = _DEFAULTS.ignore_eos
    skip_special_tokens: bool = _DEFAULTS.skip_special_tokens
    logit_bias: Annotated[LogitBias, Field(default_factory=dict)]
    json_schema: dict[str, Any] | None = None
    regex: NonEmptyText | None = None
    grammar: NonEmptyText | None = None
    prompt_progress: bool = False
    timeout: Annotated[float, Within(TIMEOUT_RANGE)] | None = None

    def sampling(self, **changes: Any) -> SamplingParams:
        """The sampling parameters, with ``changes`` to them.

        Raises:
            InvalidRequest: two fields say what the text must match.
        """
        values: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed,
            "stop": tuple(self.stop),
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
            "logit_bias": tuple(self.logit_bias.items()),
            "grammar": only_grammar(self.grammars()),
        }
        return SamplingParams(**values | changes)

    def grammars(self) -> Iterable[tuple[str, GrammarSpec]]:
        """Every field that says what the text must match, and what that is."""
        if self.json_schema is not None:
            yield "json_schema", schema_grammar(self.json_schema)
        texts: tuple[tuple[str, GrammarKind, str | None], ...] = (
            ("regex", "regex", self.regex),
            ("grammar", "lark", self.grammar),
        )
        for field, kind, text in texts:
            if text is not None:
                yield field, GrammarSpec(kind, text)


JobId = Annotated[Text, AfterValidator(_job_id), Shown({"minLength": 1, "maxLength": MAX_JOB_ID_LENGTH})]


class InferenceBody(SamplingFields):
    """``POST /v1/inference``."""

    prompt: NonEmptyText | None = None
    messages: Annotated[Many[ChatMessage], AfterValidator(_messages), Shown({"minItems": 1})] | None = None
    job_id: JobId | None = None
    logprobs: Annotated[int, within("logprobs")] | None = _DEFAULTS.logprobs
    prompt_logprobs: Annotated[int, within("prompt_logprobs")] | None = _DEFAULTS.prompt_logprobs

    @classmethod
    def _across_fields(cls, body: Mapping[str, Any]) -> Iterable[FieldError]:
        given = [name for name in ("prompt", "messages") if body.get(name) is not None]
        if not given:
            yield FieldError("prompt", "required, unless messages", "prompt is required, unless messages is given.")
        elif len(given) > 1:
            yield FieldError("messages", "not together with prompt", "messages must not be given together with prompt.")

    def to_request(self) -> GenerationRequest:
        """What the engine is asked for; ``prompt`` is taken as it is, ``messages`` go through the chat template.

        Raises:
            InvalidRequest: as :meth:`sampling`.
        """
        messages = tuple(Message(role=m.role, content=m.content) for m in self.messages) if self.messages else None
        return GenerationRequest(
            prompt=self.prompt,
            messages=messages,
            raw=messages is None,
            job_id=self.job_id,
            prompt_progress=self.prompt_progress,
            timeout_seconds=self.timeout,
            sampling=self.sampling(logprobs=self.logprobs, prompt_logprobs=self.prompt_logprobs),
        )


class LoadingBody(Body):
    """``POST /v1/loading``; without ``model``: the one given at start."""

    model: NonEmptyText | None = None
    device: Annotated[NonEmptyText, AfterValidator(_device), Shown({"pattern": f"^({_DEVICE.pattern})$"})] | None = None
    dtype: DTypeName | None = None
    quantize: Quantization | None = None


class TokenizeBody(Body):
    """``POST /tokenize``; ``add_special`` adds what the tokenizer puts around a prompt, such as a BOS token.

    Other servers call the text ``content`` or ``prompt``.
    """

    text: Annotated[Text, Field(validation_alias=AliasChoices("text", "content", "prompt"))]
    add_special: Annotated[bool, Field(validation_alias=AliasChoices("add_special", "add_special_tokens"))] = False


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    tokens: Many[TokenId]


def schema_grammar(schema: Mapping[str, Any]) -> GrammarSpec:
    """The grammar of the JSON texts that match ``schema``.

    Raises:
        InvalidRequest: it is nested too deeply.
    """
    try:
        return GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False))
    except RecursionError:
        raise InvalidRequest("The JSON schema is nested too deeply.") from None


def only_grammar(given: Iterable[tuple[str, GrammarSpec]]) -> GrammarSpec | None:
    """The only one of ``given``, pairs of a field's name and its grammar; None: there is none.

    Raises:
        InvalidRequest: there are several.
    """
    several = list(given)
    if len(several) > 1:
        (first, _), *others = several
        constraint = f"not together with {first}"
        fields = [
            FieldError(name, constraint, f"{name} must not be given together with {first}.") for name, _ in others
        ]
        raise InvalidRequest(" ".join(field.message for field in fields), fields=fields)
    return replace(several[0][1], field=several[0][0]) if several else None
