"""The bodies of the worker's own routes."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, ConfigDict, Field

from rbee_worker.config import (
    MAX_JOB_ID_LENGTH,
    PARAMS,
    DTypeName,
    GenerationRequest,
    LoadSettings,
    Message,
    Quantization,
    SamplingParams,
)
from rbee_worker.errors import FieldError
from rbee_worker.server.bodies import SamplingFields, within
from rbee_worker.server.http.fields import Body, Many, NonEmptyText, Shown, Text, TokenId, broken

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

    role: Annotated[NonEmptyText, Field(description="Which roles there are is the chat template's business.")]
    content: Annotated[Text, Field(description="The text.")]


JobId = Annotated[Text, AfterValidator(_job_id), Shown({"minLength": 1, "maxLength": MAX_JOB_ID_LENGTH})]


class InferenceBody(SamplingFields):
    """``POST /v1/inference``."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    prompt: Annotated[NonEmptyText | None, Field(description="Continued as it is. Either this or `messages`.")] = None
    messages: Annotated[
        Annotated[Many[ChatMessage], AfterValidator(_messages), Shown({"minItems": 1})] | None,
        Field(description="Rendered with the model's chat template. Either this or `prompt`."),
    ] = None
    job_id: Annotated[
        JobId | None, Field(description="Printable characters, unique among running jobs; by default a new UUID.")
    ] = None
    logprobs: Annotated[Annotated[int, within("logprobs")] | None, Field(description=PARAMS["logprobs"].help)] = (
        _DEFAULTS.logprobs
    )
    prompt_logprobs: Annotated[
        Annotated[int, within("prompt_logprobs")] | None, Field(description=PARAMS["prompt_logprobs"].help)
    ] = _DEFAULTS.prompt_logprobs

    @classmethod
    def _across_fields(cls, body: Mapping[str, Any]) -> Iterable[FieldError]:
        given = [name for name in ("prompt", "messages") if body.get(name) is not None]
        if not given:
            yield FieldError("prompt", "required, unless messages", "prompt is required, unless messages is given.")
        elif len(given) > 1:
            yield FieldError("messages", "not together with prompt", "messages must not be given together with prompt.")

    def to_request(self) -> GenerationRequest:
        """The request for the engine. ``prompt`` is used as it is; ``messages`` go through the chat template.

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

    model: Annotated[
        NonEmptyText | None,
        Field(description="The model given at start, or one of `--allow-model`; by default the former."),
    ] = None
    device: Annotated[
        Annotated[NonEmptyText, AfterValidator(_device), Shown({"pattern": f"^({_DEVICE.pattern})$"})] | None,
        Field(description="`auto`, `cpu`, `cuda`, `cuda:N` or `mps`; by default that of `serve`."),
    ] = None
    dtype: Annotated[DTypeName | None, Field(description="The dtype of the weights; by default that of `serve`.")] = (
        None
    )
    quantize: Annotated[
        Quantization | None,
        Field(description="`int8` and `int4` quantize the weights as they are loaded; by default that of `serve`."),
    ] = None
    mmap: Annotated[
        bool | None,
        Field(description="Use weights that run as they are stored where their file is mapped; by default as `serve`."),
    ] = None

    @property
    def settings(self) -> LoadSettings:
        """What is set for this load."""
        return LoadSettings(device=self.device, dtype=self.dtype, quantize=self.quantize, mmap=self.mmap)


class TokenizeBody(Body):
    """``POST /tokenize``; ``add_special`` adds what the tokenizer puts around a prompt, such as a BOS token.

    Other servers call the text ``content`` or ``prompt``.
    """

    text: Annotated[
        Text,
        Field(
            validation_alias=AliasChoices("text", "content", "prompt"), description="Also called `content` or `prompt`."
        ),
    ]
    add_special: Annotated[
        bool,
        Field(
            validation_alias=AliasChoices("add_special", "add_special_tokens"),
            description="Also called `add_special_tokens`: add what the tokenizer puts around a prompt, such as BOS.",
        ),
    ] = False


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    tokens: Annotated[Many[TokenId], Field(description="Ids of the vocabulary.")]
