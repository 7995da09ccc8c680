"""The description against the worker: what it allows is served, what it forbids is refused, and every answer fits it.

schemathesis makes the requests from the document that the worker itself serves.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rbee_worker.config import ServerConfig
from rbee_worker.server.http.operation import Operation, routes
from rbee_worker.server.native.routes import AllowedModels, Native
from rbee_worker.server.openai import OpenAI
from rbee_worker.server.openapi import Described
from rbee_worker.server.openapi.document import EVENT_STREAM, JSON, described
from rbee_worker.server.openapi.schemas import body_schemas
from tests.tiny import CHAT_TEMPLATE, write_tiny_model

from .conftest import SECONDS, Served, serving

EXAMPLES = 15
MANY_EXAMPLES = 400
MAX_TOKENS = 3

CONFORMANCE = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def operations() -> dict[tuple[str, str], Operation]:
    """What every route does, by method and path."""
    native = routes(Native(None, ServerConfig(), AllowedModels(None), None))
    every = Described([*native, *routes(OpenAI(None, ServerConfig(), None))], keyed=False).routes
    served = [(method, route) for route in every for method in route.methods - {"HEAD"}]
    return {(method, route.path_format): described(route)[0] for method, route in served}


OPERATIONS = operations()
WITH_BODY = [name for name, operation in OPERATIONS.items() if operation.body]
WITHOUT = [name for name, operation in OPERATIONS.items() if not operation.body]
GENERATING = [
    ("POST", "/v1/inference"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
]
ONE_AT_MOST = (
    "json_schema",
    "regex",
    "grammar",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "guided_choice",
)
REFUSALS = {429, 503, 504}
"""Statuses from 429 on that are right: a full queue, a model that is being swapped, a ``timeout`` of nothing."""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = write_tiny_model(tmp_path_factory.mktemp("described") / "tiny", chat_template=CHAT_TEMPLATE)
    with serving("--model", str(model)) as served:
        yield served


@pytest.fixture(scope="module")
def api(worker: Served) -> Any:
    schema = schemathesis.openapi.from_dict(closed(httpx.get(f"{worker.url}/openapi.json", timeout=SECONDS).json()))
    schema.config.update(base_url=worker.url)
    return schema


@pytest.fixture
def ready(worker: Served) -> Served:
    """With a model, whatever the tests before have done to it."""
    if httpx.get(f"{worker.url}/v1/worker").json()["loading"]:
        worker.events()
    if httpx.get(f"{worker.url}/readyz").status_code != 200:
        httpx.post(f"{worker.url}/v1/loading", json={}).raise_for_status()
        worker.events()
    return worker


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """The document, without room in answers for what it does not name."""
    bodies = body_schemas({operation.body for operation in OPERATIONS.values() if operation.body})
    for name, schema in document["components"]["schemas"].items():
        if name not in bodies and "properties" in schema:
            schema["additionalProperties"] = False
    return document


def bounded(case: Any) -> Any:
    """The same request, of which no long answer can come."""
    if (case.method, case.path) in GENERATING and isinstance(case.body, dict):
        name = "max_output_tokens" if case.path == "/v1/responses" else "max_tokens"
        for key in {name, "max_completion_tokens"} & case.body.keys() | {name}:
            value = case.body.get(key)
            if value is None or (type(value) is int and value > MAX_TOKENS):
                case.body[key] = MAX_TOKENS
    return case


def sensible(body: Any) -> Any:
    """A body without what its schema cannot rule out: integers written as 1.0, fields that exclude each other."""
    if isinstance(body, list):
        return [sensible(item) for item in body]
    if isinstance(body, float) and body.is_integer():
        return int(body)
    if not isinstance(body, dict):
        return body
    given = [name for name in ONE_AT_MOST if body.get(name) is not None]
    body = {key: sensible(value) for key, value in body.items() if key not in given[1:] and key != "model"}
    if "tools" not in body:
        body.pop("tool_choice", None)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    return body


def ask(operation: Any, *, positive: bool, examples: int) -> Counter[int]:
    """Send generated requests and check what comes back; returns the statuses."""
    mode = schemathesis.GenerationMode.POSITIVE if positive else schemathesis.GenerationMode.NEGATIVE
    statuses: Counter[int] = Counter()
    frames = frame_validator(operation)

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def request(case: Any) -> None:
        if positive and operation.body:
            case.body = sensible(case.body)
        response = bounded(case).call(timeout=SECONDS)
        statuses[response.status_code] += 1
        checks = CONFORMANCE if positive else [*CONFORMANCE, negative_data_rejection]
        expected = response.status_code in REFUSALS
        case.validate_response(response, checks=checks if expected else [*checks, not_a_server_error])
        if response.headers.get("content-type", [""])[0].startswith(EVENT_STREAM):
            for frame in response.text.split("\n\n"):
                if (data := frame.partition("data: ")[2]) not in {"", "[DONE]"}:
                    frames[response.status_code].validate(json.loads(data))

    request()
    return statuses


def frame_validator(operation: Any) -> dict[int, jsonschema_rs.Validator]:
    """By status, what checks the JSON in a frame: schemathesis looks at the frame only."""
    whole = operation.schema.raw_schema
    described = whole["paths"][operation.path][operation.method]["responses"]
    validators = {}
    for status, response in described.items():
        if content := response.get("content", {}).get(EVENT_STREAM):
            held = content["schema"]["properties"]["data"]["anyOf"][0]["contentSchema"]
            validators[int(status)] = jsonschema_rs.validator_for(held | {"components": whole["components"]})
    return validators


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_what_the_description_allows_is_answered_as_it_says(ready: Served, api: Any, method: str, path: str) -> None:
    statuses = ask(api[path][method], positive=True, examples=EXAMPLES)
    if (method, path) in GENERATING:
        assert statuses[200], statuses  # else nothing but refusals was looked at
    assert httpx.get(f"{ready.url}/livez").status_code == 200


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_what_the_description_forbids_is_refused(ready: Served, api: Any, method: str, path: str) -> None:
    statuses = ask(api[path][method], positive=False, examples=EXAMPLES)
    assert statuses.keys() == {400}
    assert httpx.get(f"{ready.url}/livez").status_code == 200


@pytest.mark.parametrize(("method", "path"), WITHOUT)
def test_routes_without_a_body_answer_as_the_description_says(ready: Served, api: Any, method: str, path: str) -> None:
    statuses = ask(api[path][method], positive=True, examples=EXAMPLES)
    assert statuses.keys() & {200, 202, 204, 404}
    assert httpx.get(f"{ready.url}/livez").status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("positive", [True, False], ids=["positive", "negative"])
@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_the_same_at_length(ready: Served, api: Any, method: str, path: str, positive: bool) -> None:
    ask(api[path][method], positive=positive, examples=MANY_EXAMPLES)
    assert httpx.get(f"{ready.url}/livez").status_code == 200


def test_the_page_shows_the_document_and_asks_for_nothing(worker: Served) -> None:
    page = httpx.get(f"{worker.url}/docs", timeout=SECONDS)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for _, path in OPERATIONS:
        assert f"</b> {path}</code>" in page.text
    for word in ("http:", "https:", "<script", "<img", "<link", "@import", "url("):
        assert word not in page.text


def test_a_worker_with_keys_asks_for_one_and_says_so() -> None:
    with serving("--no-load", "--api-key", "k", wait=False) as worker:
        for path in ("/openapi.json", "/docs"):
            assert httpx.get(worker.url + path).status_code == 401
        document = httpx.get(f"{worker.url}/openapi.json", headers={"Authorization": "Bearer k"}).json()
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        closed_to_strangers = {
            path
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
            if httpx.request(method, worker.url + path, content=b"{}").status_code == 401
        }
        keyed = {
            path
            for path, methods in document["paths"].items()
            for operation in methods.values()
            if operation["security"] == [{"key": []}]
        }
        assert keyed == closed_to_strangers
        refused = document["paths"]["/metrics"]["get"]["responses"]["401"]
        assert refused["content"][JSON]["schema"]["$ref"].endswith("/ErrorEnvelope")
        assert "WWW-Authenticate" in refused["headers"]
