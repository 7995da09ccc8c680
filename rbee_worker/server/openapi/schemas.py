"""JSON schemas of what is sent and received, under the names by which the description refers to them."""

import inspect
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from rbee_worker import events
from rbee_worker.events import InferenceEvent, LoadingEvent
from rbee_worker.server.http.fields import Body

Schema = dict[str, Any]

REF: Final = "#/components/schemas/"

LOADING_EVENTS: Final[tuple[type[LoadingEvent], ...]] = (
    events.Resolving,
    events.Downloading,
    events.LoadingToVram,
    events.WarmingUp,
    events.Stalled,
    events.Ready,
    events.LoadFailed,
    events.LoadCancelled,
)
INFERENCE_EVENTS: Final[tuple[type[InferenceEvent], ...]] = (
    events.Started,
    events.PromptProgress,
    events.PromptLogprobs,
    events.Token,
    events.End,
    events.InferenceFailed,
)

_ACROSS: Final[Mapping[str, Mapping[str, Any]]] = {
    "InferenceBody": {
        "oneOf": [
            {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
            {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
        ]
    },
    "MessageBody": {
        "anyOf": [
            {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
            {
                "required": ["role", "tool_calls"],
                "properties": {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}},
            },
        ]
    },
}
"""What bodies check beyond single fields, where a JSON schema can say it."""

_NULL: Final = {"type": "null"}
_TEMPLATE: Final = REF + "{model}"
_ATTRIBUTE = re.compile(r"^    (\w[\w, ]*): (.+(?:\n {8}.+)*)", re.MULTILINE)


def ref(name: str) -> Schema:
    """A reference to a schema of the document."""
    return {"$ref": REF + name}


def body_schemas(bodies: Iterable[type[Body]]) -> dict[str, Schema]:
    """The schemas by which request bodies are validated, and those of their parts.

    What may be left out may also be null: the rule of every :class:`Body`, which pydantic's schemas do not know.
    """
    _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=_TEMPLATE)
    schemas: dict[str, Schema] = found.get("$defs", {})
    for schema in schemas.values():
        schema["description"] = plain(schema["description"])
        schema.pop("title", None)
        for name, value in schema["properties"].items():
            required = name in schema.get("required", ())
            schema["properties"][name] = _tidied(value) if required else _or_null(_tidied(value))
    for kind in _ACROSS.keys() & schemas.keys():
        schemas[kind] |= _ACROSS[kind]
    return schemas


def record_schemas(records: Iterable[type]) -> dict[str, Schema]:
    """Schemas of what is sent: TypedDicts and dataclasses, those of their parts among them.

    A TypedDict says everything itself: its docstring, a field's ``Field(description=...)``, ``NotRequired`` for a
    key that may be absent. Of a dataclass that is named here, the docstring's ``Attributes`` tell of the fields, and
    a field whose default is None is left out of the JSON instead of being null.
    """
    known = {record.__name__: record for record in records}
    adapters = [(name, "validation", TypeAdapter[Any](record)) for name, record in known.items()]
    _, found = TypeAdapter.json_schemas(adapters, ref_template=_TEMPLATE)  # type: ignore[arg-type]  # its own Literal
    schemas: dict[str, Schema] = found.get("$defs", {})
    for name, schema in schemas.items():
        record = known.get(name)
        told: Mapping[str, str] = {}
        absent: Container[str] = ()
        if is_dataclass(record):
            told = _attributes(record)
            absent = [field.name for field in fields(record) if field.default is None and not field.metadata]
            schema["description"] = (inspect.getdoc(record) or "").partition("\n\nAttributes:")[0]
        schema["description"] = plain(schema.get("description", ""))
        schema.pop("title", None)
        for key, value in schema.get("properties", {}).items():
            tidy = _not_null(_tidied(value)) if key in absent else _tidied(value)
            schema["properties"][key] = tidy | ({"description": told[key]} if key in told else {})
    return schemas


def event_schemas() -> dict[str, Schema]:
    """Schemas of every event, and of what may come in each of the two kinds of streams."""
    schemas = record_schemas([*LOADING_EVENTS, *INFERENCE_EVENTS, events.LoadReport, events.TokenLogprob])
    streams: tuple[tuple[str, str, tuple[type, ...]], ...] = (
        ("LoadingEvent", "stage", LOADING_EVENTS),
        ("InferenceEvent", "event", INFERENCE_EVENTS),
    )
    for stream, discriminator, kinds in streams:
        mapping = {}
        for kind in kinds:
            word, schema = getattr(kind, discriminator), schemas[kind.__name__]
            schema["properties"] = {discriminator: {"const": word, "type": "string"}} | schema.get("properties", {})
            schema["required"] = [discriminator, *schema.get("required", ())]
            mapping[word] = REF + kind.__name__
        schemas[stream] = {
            "description": "What a frame of such a stream holds.",
            "oneOf": [ref(kind.__name__) for kind in kinds],
            "discriminator": {"propertyName": discriminator, "mapping": mapping},
        }
    return schemas


def _tidied(schema: Schema) -> Schema:
    """Without pydantic's titles, and without a default that only says that there is none."""
    return {key: value for key, value in schema.items() if key != "title" and (key, value) != ("default", None)}


def _or_null(schema: Schema) -> Schema:
    """The schema, or null."""
    options = schema.get("anyOf")
    if options is not None:
        return schema if _NULL in options else schema | {"anyOf": [*options, _NULL]}
    outside = {key: schema[key] for key in ("default", "description") if key in schema}
    return {"anyOf": [{key: value for key, value in schema.items() if key not in outside}, _NULL]} | outside


def _not_null(schema: Schema) -> Schema:
    """The schema without null."""
    options = [option for option in schema.get("anyOf", ()) if option != _NULL]
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    if not options:
        return rest
    return rest | (options[0] if len(options) == 1 else {"anyOf": options})


def _attributes(record: type) -> dict[str, str]:
    """The ``Attributes`` of a class's docstring."""
    _, _, listed = (inspect.getdoc(record) or "").partition("\n\nAttributes:\n")
    return {
        name.strip(): _sentence(plain(text)) for names, text in _ATTRIBUTE.findall(listed) for name in names.split(",")
    }


def plain(text: str) -> str:
    """A docstring's text: one line, in Markdown."""
    unmarked = re.sub(r":class:`[~.\w]*?(\w+)`", r"`\1`", text)
    return re.sub(r"\s+", " ", unmarked.replace("``", "`")).strip()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
