"""The description is whole: every route, every field, and nothing that is not there."""

import dataclasses
import hashlib
import json
import re
from base64 import b64encode
from typing import Annotated, Any, NotRequired

import jsonschema_rs
import pytest
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from typing_extensions import TypedDict

from rbee_worker import errors
from rbee_worker.config import (
    CHOICES_RANGE,
    LOGIT_BIAS_RANGE,
    MAX_LOGIT_BIAS,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    RANGES,
    SEED_MAX,
    SEED_MIN,
    ServerConfig,
)
from rbee_worker.events import to_dict
from rbee_worker.runtime.machine.devices import DeviceInfo
from rbee_worker.server.app import create_app
from rbee_worker.server.http.envelope import Json
from rbee_worker.server.http.operation import Operation, routes
from rbee_worker.server.openapi.document import TAGS, build, described
from rbee_worker.server.openapi.page import POLICY, STYLE, render
from rbee_worker.server.openapi.schemas import INFERENCE_EVENTS, LOADING_EVENTS, REF, body_schemas, record_schemas
from tests.unit import samples


class Part(TypedDict):
    """A part,
    a ``small`` one."""

    size: int


class Whole(TypedDict):
    """A whole."""

    first: Annotated[Part, Field(description="The first.")]
    others: list[Part | DeviceInfo]
    reason: NotRequired[Annotated[str, Field(description="Why.")]]
    length: int | None


def registered(stand_in) -> list[Route]:
    app = create_app(stand_in.Worker(), ServerConfig())
    return [route for route in app.routes if isinstance(route, Route)]


@pytest.fixture
def document(stand_in) -> dict[str, Any]:
    return build(registered(stand_in), keyed=True)


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_route_and_method_is_described_and_no_other(stand_in, document):
    there = {(method, route.path_format) for route in registered(stand_in) for method in route.methods - {"HEAD"}}
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == there


def test_a_route_without_an_operation_above_its_handler_is_an_error(stand_in):
    async def handler(_request: Request) -> Response:
        return Response()

    routes = [*registered(stand_in), Route("/v1/new", handler, methods=["GET"])]
    with pytest.raises(LookupError, match="handler of /v1/new"):
        build(routes, keyed=False)


class Handlers:
    @Operation("POST", "/thing/{id:path}", tag="worker", statuses=(200, 202))
    async def thing(self, _request: Request) -> Json[Whole] | Response:
        """Do a thing.

        It is ``small``,
        and done at once.
        """
        return Response(self.__class__.__name__)


def test_what_stands_above_a_handler_and_in_it_is_its_route_and_its_description():
    (route,) = routes(Handlers())
    assert (route.path_format, route.methods) == ("/thing/{id}", {"POST"})
    assert route.endpoint.__self__.__class__ is Handlers
    document = build([route], keyed=False)
    thing = document["paths"]["/thing/{id}"]["post"]
    assert (thing["summary"], thing["description"]) == ("Do a thing", "It is `small`, and done at once.")
    for status in ("200", "202"):
        assert thing["responses"][status]["content"] == {"application/json": {"schema": {"$ref": REF + "Whole"}}}
    assert document["components"]["schemas"].keys() >= {"Whole", "Part"}


def test_parts_of_paths_are_parameters(document):
    for path, methods in document["paths"].items():
        for operation in methods.values():
            named = {parameter["name"] for parameter in operation.get("parameters", ())}
            assert named == set(re.findall(r"\{(\w+)\}", path)), path


def test_references_lead_somewhere_and_every_schema_is_referred_to(document):
    found = references(document)
    kinds = ("schemas", "headers")
    there = {f"#/components/{kind}/{name}" for kind in kinds for name in document["components"][kind]}
    mapped = {ref for schema in document["components"]["schemas"].values() for ref in mapping(schema)}
    assert found <= there
    assert mapped <= there
    # The two unions are what streams refer to; only their members may be left over.
    assert there - found == set()


def mapping(schema: dict[str, Any]) -> set[str]:
    return set(schema.get("discriminator", {}).get("mapping", {}).values())


def test_schemas_are_schemas_and_ids_and_tags_are_known(document):
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"})
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    assert {tag for operation in operations for tag in operation["tags"]} == TAGS.keys()
    assert all(operation["summary"] for operation in operations)
    assert document["openapi"] == "3.1.0"


def test_every_field_of_a_body_is_described(stand_in):
    bodies = {described(route)[0].body for route in registered(stand_in) for method in route.methods - {"HEAD"}}
    for kind, schema in body_schemas(bodies - {None}).items():
        assert schema["description"], kind
        for name, field in schema["properties"].items():
            assert field.get("description"), f"{kind}.{name}"


def test_descriptions_are_in_clients_words(document):
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    inner = re.compile(rf"``|:class:|\bBase:|\b({'|'.join(kinds - {'NotFound', 'Cancelled', 'Conflict'})})\b")
    told = re.findall(r'"(?:description|summary)": "((?:[^"\\]|\\.)*)"', json.dumps(document))
    assert len(told) > 300
    assert [text for text in told if inner.search(text)] == []


def test_ranges_are_those_of_the_settings(document):
    schemas = document["components"]["schemas"]
    properties = schemas["InferenceBody"]["properties"]
    for name, bounds in RANGES.items():
        number = next(option for option in properties[name]["anyOf"] if option != {"type": "null"})
        assert (number.get("minimum"), number.get("maximum"), number.get("exclusiveMinimum")) == (
            bounds.low,
            bounds.high,
            bounds.above,
        ), name
    seed, _ = properties["seed"]["anyOf"]
    assert (seed["minimum"], seed["maximum"]) == (SEED_MIN, SEED_MAX)
    text, texts, _ = properties["stop"]["anyOf"]
    assert (text["minLength"], text["maxLength"], texts["maxItems"]) == (1, MAX_STOP_LENGTH, MAX_STOP_SEQUENCES)
    assert texts["items"] == text
    biases, _ = properties["logit_bias"]["anyOf"]
    assert biases["maxProperties"] == MAX_LOGIT_BIAS
    assert biases["additionalProperties"]["maximum"] == LOGIT_BIAS_RANGE.high
    answers, _ = schemas["ChatBody"]["properties"]["n"]["anyOf"]
    assert answers["maximum"] == CHOICES_RANGE.high
    assert schemas["ChatBody"]["required"] == ["messages"]


@pytest.mark.parametrize(
    "event", [*samples.LOAD[:2], *samples.LOAD[-2:], *samples.JOB], ids=lambda event: type(event).__name__
)
def test_events_fit_their_schema_and_nothing_else(document, event):
    name = "LoadingEvent" if isinstance(event, LOADING_EVENTS) else "InferenceEvent"
    whole = {"$ref": REF + name, "components": document["components"]}
    told = to_dict(event)
    jsonschema_rs.validator_for(whole).validate(told)
    for key in told:
        optional = {field.name for field in dataclasses.fields(event) if field.default is None}
        without = {other: value for other, value in told.items() if other != key}
        assert jsonschema_rs.validator_for(whole).is_valid(without) == (key in optional), key


def test_a_typed_dict_is_described_by_itself_and_its_parts_with_it():
    schemas = record_schemas([Whole])
    assert schemas.keys() == {"Whole", "Part", "DeviceInfo"}
    assert schemas["Part"]["description"] == "A part, a `small` one."
    whole = schemas["Whole"]
    assert whole["description"] == "A whole."
    assert whole["required"] == ["first", "others", "length"]
    assert whole["properties"] == {
        "first": {"$ref": REF + "Part", "description": "The first."},
        "others": {"type": "array", "items": {"anyOf": [{"$ref": REF + "Part"}, {"$ref": REF + "DeviceInfo"}]}},
        "reason": {"type": "string", "description": "Why."},
        "length": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    }


def test_every_event_is_in_the_union_of_its_streams(document):
    for name, kinds in (("LoadingEvent", LOADING_EVENTS), ("InferenceEvent", INFERENCE_EVENTS)):
        union = document["components"]["schemas"][name]
        assert [option["$ref"] for option in union["oneOf"]] == [REF + kind.__name__ for kind in kinds]


def test_without_keys_nothing_asks_for_one(stand_in):
    document = build(registered(stand_in), keyed=False)
    assert "securitySchemes" not in document["components"]
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert not any("security" in operation or "401" in operation["responses"] for operation in operations)


def test_the_page_escapes_what_it_shows(document):
    document["info"]["title"] = "<script>"
    next(iter(document["paths"].values()))["get"]["summary"] = "a < b & `c`"
    page = render(document)
    assert "<script" not in page
    assert "a &lt; b &amp; <code>c</code>" in page


def test_the_page_may_use_its_own_style_and_nothing_else(document):
    page = render(document)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style == STYLE
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in POLICY
    assert POLICY.startswith("default-src 'none'")
    anchors = set(re.findall(r' id="([^"]+)"', page))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= anchors


def test_both_are_served_and_made_once(start):
    server = start()
    first = server.ask("GET", "/openapi.json")
    assert first.status == 200
    assert first.headers["content-type"] == "application/json"
    assert json.loads(first.body)["info"]["title"] == "rbee-worker"
    assert server.ask("GET", "/openapi.json").body == first.body
    page = server.ask("GET", "/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == POLICY
