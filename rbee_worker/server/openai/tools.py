"""Functions that a model may call or has called, as chat completions and responses spell them."""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator

from rbee_worker.server.http.fields import Body, NonEmptyText, Text


class Function(Body):
    """A function that the model may call; without ``parameters`` it takes none."""

    name: NonEmptyText
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def _arguments(value: Any) -> Any:
    # Some clients send back the object that they have parsed.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class FunctionCall(Body):
    """The function of an earlier tool call, and the JSON text of its arguments."""

    name: NonEmptyText
    arguments: Annotated[Text, BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any])]
