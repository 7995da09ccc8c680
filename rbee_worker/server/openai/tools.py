"""Functions that a model may call or has called, in the form that chat completions and responses share."""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rbee_worker.server.http.fields import Body, NonEmptyText, Text


class Function(Body):
    """A function that the model may call; without ``parameters`` it takes none."""

    name: Annotated[NonEmptyText, Field(description="The name of the function.")]
    description: Annotated[Text | None, Field(description="What it is for, for the model.")] = None
    parameters: Annotated[
        dict[str, Any] | None, Field(description="JSON schema of the arguments; without it there are none.")
    ] = None
    strict: Annotated[bool | None, Field(description="Arguments match the schema wherever the call is forced.")] = None


def _arguments(value: Any) -> Any:
    # Some clients parse the arguments, and send them back as an object.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class FunctionCall(Body):
    """The function of an earlier tool call, and the JSON text of its arguments."""

    name: Annotated[NonEmptyText, Field(description="The name of the function.")]
    arguments: Annotated[
        Text,
        BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any]),
        Field(description="JSON text, or the object itself."),
    ]
