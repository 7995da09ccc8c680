"""The fields that every request for text may have, in each API: sampling parameters, grammars, timeout."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, create_model

from rbee_worker.config import (
    LOGIT_BIAS_RANGE,
    MAX_LOGIT_BIAS,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    PARAMS,
    RANGES,
    SEED_MAX,
    SEED_MIN,
    TIMEOUT_RANGE,
    GrammarKind,
    GrammarSpec,
    SamplingParams,
)
from rbee_worker.errors import FieldError, InvalidRequest
from rbee_worker.server.http.fields import Body, NonEmptyText, Shown, Within, broken

_TOKEN_ID = re.compile(r"[0-9]{1,9}")


def within(name: str) -> Within:
    """An annotation with the range of a sampling parameter."""
    return Within(RANGES[name])


def _biases(value: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    if len(value) > MAX_LOGIT_BIAS:
        raise broken(f"at most {MAX_LOGIT_BIAS} entries")
    numbers = (isinstance(bias, int | float) and not isinstance(bias, bool) for bias in value.values())
    ids = (_TOKEN_ID.fullmatch(key) for key in value)
    if not all(ids) or not all(numbers) or any(bias not in LOGIT_BIAS_RANGE for bias in value.values()):
        raise broken(f"an object of token ids and their biases, {LOGIT_BIAS_RANGE}")
    return tuple({int(key): float(bias) for key, bias in value.items()}.items())


def _seed(value: int) -> int:
    if not SEED_MIN <= value <= SEED_MAX:
        raise broken("64-bit integer")
    return value


def _stop_list(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise broken("string or list of strings")
    if len(value) > MAX_STOP_SEQUENCES:
        raise broken(f"at most {MAX_STOP_SEQUENCES} strings")
    return value


LogitBias = Annotated[
    dict[str, Any],
    AfterValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": f"^{_TOKEN_ID.pattern}$"},
            "additionalProperties": {
                "type": "number",
                "minimum": LOGIT_BIAS_RANGE.low,
                "maximum": LOGIT_BIAS_RANGE.high,
            },
        }
    ),
]
Seed = Annotated[int, AfterValidator(_seed), Shown({"minimum": SEED_MIN, "maximum": SEED_MAX})]
_StopText = Annotated[NonEmptyText, Shown({"maxLength": MAX_STOP_LENGTH})]
_StopTexts = Annotated[list[_StopText], Shown({"maxItems": MAX_STOP_SEQUENCES})]
Stop = Annotated[
    list[NonEmptyText],
    BeforeValidator(_stop_list, json_schema_input_type=_StopText | _StopTexts),
    AfterValidator(tuple),
]


_SPELLED: Final[Mapping[str, Any]] = {"seed": Seed, "stop": Stop, "logit_bias": LogitBias}
"""Parameters with their own form or check. All others are numbers in a range, or booleans."""

_ELSEWHERE: Final = frozenset({"logprobs", "prompt_logprobs", "grammar"})
"""Parameters that differ between the APIs. Bodies define them, and pass them to :meth:`SamplingFields.sampling`."""


def _fields() -> dict[str, Any]:
    """Name -> type and default of all other sampling parameters, as pydantic's ``create_model`` takes them."""
    kinds, defaults = get_type_hints(SamplingParams), SamplingParams()
    return {name: _field(name, kinds[name], getattr(defaults, name)) for name in PARAMS if name not in _ELSEWHERE}


def _field(name: str, kind: Any, default: Any) -> tuple[Any, Any]:
    if name in _SPELLED:
        kind = _SPELLED[name]
    elif name in RANGES:
        # Without `| None`, because in every body null means absent.
        number = get_args(kind)[0] if isinstance(kind, UnionType) else kind
        kind = Annotated[number, within(name)]
    kind = Annotated[kind, Field(description=PARAMS[name].help)]
    # A factory keeps a useless default, [], out of the schema.
    return kind, Field(default_factory=tuple) if default == () else default


if TYPE_CHECKING:

    class _Parameters(Body):
        """For type checkers: the fields that code reads by name. :meth:`SamplingFields.sampling` reads all fields."""

        max_tokens: int | None
        temperature: float
        top_p: float
        presence_penalty: float
        frequency_penalty: float
        seed: int | None
else:
    _Parameters = create_model("_Parameters", __base__=Body, **_fields())


class SamplingFields(_Parameters):
    """What every request for text may say of how it is made: the sampling parameters, and the fields below."""

    json_schema: Annotated[
        dict[str, Any] | None,
        Field(description="A JSON schema that the text must match; at most one field says what it must match."),
    ] = None
    regex: Annotated[NonEmptyText | None, Field(description="A regular expression that the text must match.")] = None
    grammar: Annotated[
        NonEmptyText | None, Field(description="A grammar, in llguidance's dialect of Lark, that the text must match.")
    ] = None
    prompt_progress: Annotated[
        bool, Field(description="Tell how much of the prompt has been processed, as it is; on streams only.")
    ] = False
    timeout: Annotated[
        Annotated[float, Within(TIMEOUT_RANGE)] | None,
        Field(description="Seconds that the request may take, waiting included."),
    ] = None

    def sampling(self, **changes: Any) -> SamplingParams:
        """The sampling parameters, with ``changes``.

        Raises:
            InvalidRequest: several fields say what the text must match, or a value is out of range.
        """
        values = {name: getattr(self, name) for name in PARAMS if name not in _ELSEWHERE}
        return SamplingParams(**values | {"grammar": only_grammar(self.grammars())} | changes)

    def grammars(self) -> Iterable[tuple[str, GrammarSpec]]:
        """Pairs of name and grammar, for each given field that says what the text must match."""
        if self.json_schema is not None:
            yield "json_schema", schema_grammar(self.json_schema)
        texts: tuple[tuple[str, GrammarKind, str | None], ...] = (
            ("regex", "regex", self.regex),
            ("grammar", "lark", self.grammar),
        )
        for field, kind, text in texts:
            if text is not None:
                yield field, GrammarSpec(kind, text)


def schema_grammar(schema: Mapping[str, Any]) -> GrammarSpec:
    """The grammar for JSON that matches ``schema``.

    Raises:
        InvalidRequest: the schema is nested too deeply.
    """
    try:
        return GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False))
    except RecursionError:
        raise InvalidRequest("The JSON schema is nested too deeply.") from None


def only_grammar(given: Iterable[tuple[str, GrammarSpec]]) -> GrammarSpec | None:
    """The only grammar in ``given``; None: there is none.

    Args:
        given: pairs of a field's name and its grammar.

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
