"""JSON schemas of bodies, answers and events, by the names under which the document refers to them."""

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core.core_schema import DataclassSchema

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

_NULL: Final = {"type": "null"}
_TEMPLATE: Final = REF + "{model}"
_ATTRIBUTE = re.compile(r"^    (\w[\w, ]*): (.+(?:\n {8}.+)*)", re.MULTILINE)


def ref(name: str) -> Schema:
    """A reference to the schema with this name in the document."""
    return {"$ref": REF + name}


def body_schemas(bodies: Iterable[type[Body]]) -> dict[str, Schema]:
    """Schemas of request bodies and of their parts, from the classes that validate them.

    A field that may be left out may also be null. Every :class:`Body` has this rule, but pydantic's schemas lack it.
    """
    _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=_TEMPLATE)
    schemas: dict[str, Schema] = found.get("$defs", {})
    for schema in schemas.values():
        schema["description"] = plain(schema["description"])
        schema.pop("title", None)
        for name, value in schema["properties"].items():
            required = name in schema.get("required", ())
            schema["properties"][name] = _tidied(value) if required else _or_null(_tidied(value))
    return schemas


class _Generator(GenerateJsonSchema):
    """Adds the docstrings of dataclasses. pydantic leaves out ``Attributes``, and older versions leave out all."""

    def dataclass_schema(self, schema: DataclassSchema) -> Schema:
        """As pydantic's, but a field with the default None cannot be null, because the JSON leaves it out then."""
        generated, record = super().dataclass_schema(schema), schema["cls"]
        generated["description"] = (inspect.getdoc(record) or "").partition("\n\nAttributes:")[0]
        told, absent = _attributes(record), {field.name for field in fields(record) if field.default is None}
        for name, value in generated.get("properties", {}).items():
            described = value | ({"description": told[name]} if name in told else {})
            generated["properties"][name] = _not_null(described) if name in absent else described
        return generated


def record_schemas(records: Iterable[Any]) -> dict[str, Schema]:
    """Schemas of TypedDicts and dataclasses that are sent, and of their parts. Docstrings give the descriptions.

    A field of a TypedDict is described by ``Field(description=...)``, and may be absent if it is ``NotRequired``. A
    field of a dataclass is described in ``Attributes``, and may be absent if its default is None.
    """
    adapters = [(record.__name__, "validation", TypeAdapter[Any](record)) for record in records]
    _, found = TypeAdapter.json_schemas(adapters, ref_template=_TEMPLATE, schema_generator=_Generator)  # type: ignore[arg-type]  # its own Literal
    schemas: dict[str, Schema] = found.get("$defs", {})
    for schema in schemas.values():
        schema["description"] = plain(schema["description"])
        schema.pop("title", None)
        schema["properties"] = {name: _tidied(value) for name, value in schema.get("properties", {}).items()}
    return schemas


def event_schemas() -> dict[str, Schema]:
    """Schemas of all events, and one for each of the two kinds of streams: any of its events."""
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
    """The schema without pydantic's title, and without a default of None."""
    return {key: value for key, value in schema.items() if key != "title" and (key, value) != ("default", None)}


def _or_null(schema: Schema) -> Schema:
    """The schema, but null is allowed too."""
    options = schema.get("anyOf")
    if options is not None:
        return schema if _NULL in options else schema | {"anyOf": [*options, _NULL]}
    outside = {key: schema[key] for key in ("default", "description") if key in schema}
    return {"anyOf": [{key: value for key, value in schema.items() if key not in outside}, _NULL]} | outside


def _not_null(schema: Schema) -> Schema:
    """The schema, but null is not allowed."""
    options = [option for option in schema.get("anyOf", ()) if option != _NULL]
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    if not options:
        return rest
    return rest | (options[0] if len(options) == 1 else {"anyOf": options})


def _attributes(record: type) -> dict[str, str]:
    """Name -> text of each attribute in a class's docstring."""
    _, _, listed = (inspect.getdoc(record) or "").partition("\n\nAttributes:\n")
    return {
        name.strip(): _sentence(plain(text)) for names, text in _ATTRIBUTE.findall(listed) for name in names.split(",")
    }


def plain(text: str) -> str:
    """The text of a docstring as Markdown on one line."""
    unmarked = re.sub(r":class:`[~.\w]*?(\w+)`", r"`\1`", text)
    return re.sub(r"\s+", " ", unmarked.replace("``", "`")).strip()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
