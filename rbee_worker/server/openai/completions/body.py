"""The body of a completion."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from rbee_worker.config import CHOICES_RANGE, PARAMS, RANGES, Range
from rbee_worker.errors import FieldError
from rbee_worker.server.bodies import within
from rbee_worker.server.http.fields import Many, NonEmptyText, Shown, TokenId, Within, broken
from rbee_worker.server.openai.bodies import OpenAIBody
from rbee_worker.server.openai.refusals import EVERYWHERE, OF_COMPLETIONS, refused

COMPLETION_TOKENS = 16
"""The default of ``max_tokens``, which is OpenAI's."""

_MOST_ANSWERS = int(CHOICES_RANGE.high or 0)


def _prompt_form(value: Any) -> str:
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "<lists of token ids>"
    return "<texts>" if isinstance(first, str) else "<token ids>"


def _not_empty(value: list[Any]) -> list[Any]:
    if not value:
        raise broken("not empty")
    return value


def _few(value: Any) -> Any:
    # Runs before each prompt is checked.
    if isinstance(value, list) and len(value) > _MOST_ANSWERS:
        raise broken(f"for at most {_MOST_ANSWERS} answers, n for each")
    return value


def _token_ids(value: Any) -> Any:
    # Runs before each item is checked, so that a million bad items give one error.
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise broken("not empty, and token ids only")
    return value


_SEVERAL = Shown({"minItems": 1, "maxItems": _MOST_ANSWERS})
TokenIds = Annotated[Many[TokenId], BeforeValidator(_token_ids), Shown({"minItems": 1})]
Prompt = Annotated[
    Annotated[NonEmptyText, Tag("<text>")]
    | Annotated[Many[NonEmptyText], BeforeValidator(_few), AfterValidator(_not_empty), _SEVERAL, Tag("<texts>")]
    | Annotated[TokenIds, Tag("<token ids>")]
    | Annotated[
        Many[TokenIds], BeforeValidator(_few), AfterValidator(_not_empty), _SEVERAL, Tag("<lists of token ids>")
    ],
    Discriminator(_prompt_form),
]


class CompletionBody(OpenAIBody):
    """``POST /v1/completions``."""

    prompt: Annotated[Prompt, Field(description="A text, token ids, or a list of either.")]
    echo: Annotated[bool, Field(description="Give the prompt back before the text.")] = False
    logprobs: Annotated[Annotated[int, within("logprobs")] | None, Field(description=PARAMS["logprobs"].help)] = None
    max_tokens: Annotated[
        Annotated[int, Within(Range(low=0, high=RANGES["max_tokens"].high))] | None,
        Field(description="Tokens to generate at most. 0 with `echo` only: nothing but the prompt comes back."),
    ] = COMPLETION_TOKENS

    @classmethod
    def _across_fields(cls, body: Mapping[str, Any]) -> Iterable[FieldError]:
        yield from refused(body, EVERYWHERE, OF_COMPLETIONS)
        if body.get("max_tokens") == 0 and not body.get("echo"):
            yield FieldError("max_tokens", ">= 1 without echo", "max_tokens must be >= 1 without echo.")
        prompt, n = body.get("prompt"), body.get("n") or 1
        several = len(prompt) if isinstance(prompt, list) and not isinstance([*prompt, 0][0], int) else 1
        if isinstance(n, int) and n in CHOICES_RANGE and 0 < several <= _MOST_ANSWERS < several * n:
            constraint = f"at most {_MOST_ANSWERS} answers, n for each"
            yield FieldError("prompt", constraint, f"prompt must be for {constraint}.")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts: each is a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt
