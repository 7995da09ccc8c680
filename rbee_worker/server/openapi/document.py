"""Makes the OpenAPI 3.1 document from the routes, as their handlers describe them."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from starlette.routing import Route
from typing_extensions import is_typeddict

from rbee_worker import __version__
from rbee_worker.errors import (
    BodyEncoded,
    BodyTooLarge,
    Forbidden,
    HeadersTooLarge,
    InvalidRequest,
    RbeeError,
    RequestTimeout,
    Unauthorized,
    Unavailable,
)
from rbee_worker.server.http.access import OPEN_PATHS
from rbee_worker.server.http.envelope import ErrorEnvelope
from rbee_worker.server.http.operation import Errors, Operation, json_shape, operation_of
from rbee_worker.server.openapi.schemas import Schema, body_schemas, event_schemas, plain, record_schemas, ref

JSON: Final = "application/json"
EVENT_STREAM: Final = "text/event-stream"

ABOUT: Final = """\
An LLM worker: its loading progress and its tokens as Server-Sent Events, and OpenAI's API.

- `GET` routes answer `HEAD` too.
- Bodies are JSON objects in UTF-8, whatever their content type says. `null` means absent. Unknown fields are ignored.
- An integer is written as one: `1.0` is none.
- Every response carries `X-Correlation-ID`: the request's own where that is a UUID, else a new one.
- A stream's frames are `data: ` and one line of JSON; the last one is `data: [DONE]`, on every path.
"""

TAGS: Final[Mapping[str, str]] = {
    "inference": "Text, streamed.",
    "openai": "What OpenAI's clients ask for.",
    "tokens": "Text to token ids and back.",
    "loading": "Loading, and its progress.",
    "worker": "What the worker says of itself.",
}

_EVERYWHERE: Final[Errors] = (HeadersTooLarge, RbeeError)
_BEHIND_THE_DOOR: Final[Errors] = (Forbidden, Unavailable)
_WITH_BODY: Final[Errors] = (InvalidRequest, RequestTimeout, BodyTooLarge, BodyEncoded)
_UNEXPECTED: Final = "The worker failed. Its log says why."
_RETRY_LATER: Final = frozenset({429, 503})


def build(routes: Iterable[Route], *, keyed: bool) -> dict[str, Any]:
    """Make the document.

    Args:
        routes: the routes that are served. ``HEAD`` is left out.
        keyed: whether requests need an API key.

    Raises:
        LookupError: a route's handler has no operation.
        ValueError: two schemas have the same name.
    """
    served = [(method, route) for route in routes for method in sorted((route.methods or set()) - {"HEAD"})]
    paths: dict[str, dict[str, Any]] = {}
    for method, route in served:
        paths.setdefault(route.path_format, {})[method.lower()] = _operation(method, route, keyed=keyed)
    components: dict[str, Any] = {"schemas": _component_schemas(served), "headers": _headers()}
    if keyed:
        scheme = {"type": "http", "scheme": "bearer", "description": "A key of `--api-key` or `--api-key-file`."}
        components["securitySchemes"] = {"key": scheme}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rbee-worker",
            "version": __version__,
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": dict(sorted(paths.items())),
        "components": components,
    }


def _component_schemas(served: Iterable[tuple[str, Route]]) -> dict[str, Schema]:
    """All schemas that the document refers to, by name."""
    all_described = [described(route) for _, route in served]
    bodies = {operation.body for operation, _, _ in all_described if operation.body is not None}
    shapes = {shape for operation, _, answer in all_described for shape in (answer, *operation.frames)}
    sent = [ErrorEnvelope, *(shape for shape in shapes if is_typeddict(shape))]
    parts = (event_schemas(), record_schemas(sent), body_schemas(sorted(bodies, key=lambda body: body.__name__)))
    schemas: dict[str, Schema] = {}
    for part in parts:
        if shared := [name for name in sorted(schemas.keys() & part.keys()) if schemas[name] != part[name]]:
            raise ValueError(f"two schemas are called {', '.join(shared)}")
        schemas |= part
    return dict(sorted(schemas.items()))


def described(route: Route) -> tuple[Operation, str, Any]:
    """A route's operation, its handler's docstring, and the shape of its JSON answers.

    Raises:
        LookupError: the handler has no operation.
    """
    operation = operation_of(route.endpoint)
    if operation is None:
        raise LookupError(f"no @Operation(...) stands above the handler of {route.path}")
    return operation, inspect.getdoc(route.endpoint) or "", json_shape(route.endpoint)


def _operation(method: str, route: Route, *, keyed: bool) -> dict[str, Any]:
    operation, text, shape = described(route)
    path = route.path_format
    opened = path in OPEN_PATHS
    summary, _, description = text.partition("\n\n")
    out: dict[str, Any] = {
        "tags": [operation.tag],
        "operationId": _operation_id(method, path),
        "summary": summary.removesuffix("."),
    }
    if description:
        out["description"] = plain(description)
    if operation.parameters:
        out["parameters"] = [
            {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
            for name, text in operation.parameters.items()
        ]
    if operation.body is not None:
        content = {JSON: {"schema": ref(operation.body.__name__)}}
        out["requestBody"] = {"required": True, "content": content}
    errors = (
        *operation.errors,
        *(_WITH_BODY if operation.body is not None else ()),
        *(() if opened else _BEHIND_THE_DOOR),
        *((Unauthorized,) if keyed and not opened else ()),
        *_EVERYWHERE,
    )
    responses = dict.fromkeys(operation.statuses, _answer(operation, shape))
    for status in sorted({error.http_status for error in errors} - responses.keys()):
        raised = [error for error in errors if error.http_status == status]
        responses[status] = _error(status, raised, operation)
    out["responses"] = {str(status): response for status, response in sorted(responses.items())}
    if keyed:
        out["security"] = [] if opened else [{"key": []}]
    return out


def _operation_id(method: str, path: str) -> str:
    """Such as ``post_v1_inference``."""
    words = "".join(char if char.isalnum() else " " for char in path).split()
    return "_".join([method.lower(), *(words or ["index"])])


def _answer(operation: Operation, shape: Any) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if shape is not None:
        content[JSON] = {"schema": ref(shape.__name__) if is_typeddict(shape) else {"type": "object"}}
    if operation.frames:
        content[EVENT_STREAM] = {"schema": frame_schema([shape.__name__ for shape in operation.frames])}
    if operation.media_type is not None:
        content[operation.media_type] = {"schema": {"type": "string"}}
    response = {"description": "As asked." if content else "Done.", "headers": _always()}
    return response | ({"content": content} if content else {})


def frame_schema(names: Sequence[str]) -> Schema:
    """The schema of one frame of a stream: an object with the field ``data``. ``names``: the schemas of its JSON."""
    held = [ref(name) for name in names]
    schema = held[0] if len(held) == 1 else {"anyOf": held}
    data = {
        "anyOf": [
            {"type": "string", "contentMediaType": JSON, "contentSchema": schema},
            {"const": "[DONE]", "description": "The last frame."},
        ]
    }
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _error(status: int, raised: Iterable[type[RbeeError]], operation: Operation) -> dict[str, Any]:
    texts = ((error.code, _UNEXPECTED if error is RbeeError else inspect.getdoc(error)) for error in raised)
    told = dict.fromkeys(f"`{code}`: {text}" for code, text in texts)
    content: dict[str, Any] = {JSON: {"schema": ref("ErrorEnvelope")}}
    if operation.streams_errors:
        content[EVENT_STREAM] = {"schema": frame_schema(["InferenceFailed"])}
    headers = _always()
    if status in _RETRY_LATER:
        headers["Retry-After"] = {"$ref": "#/components/headers/RetryAfter"}
    if status == Unauthorized.http_status:
        headers["WWW-Authenticate"] = {"$ref": "#/components/headers/Bearer"}
    return {"description": " ".join(told), "headers": headers, "content": content}


def _always() -> dict[str, Any]:
    return {name: {"$ref": "#/components/headers/CorrelationId"} for name in ("X-Correlation-ID", "X-Request-ID")}


def _headers() -> dict[str, Any]:
    seconds = {"type": "integer", "minimum": 1, "maximum": 60}
    return {
        "CorrelationId": {
            "description": "The request's id: its own `X-Correlation-ID` where that is a UUID, else a new one.",
            "required": True,
            "schema": {"type": "string", "format": "uuid"},
        },
        "RetryAfter": {"description": "Seconds to wait.", "required": True, "schema": seconds},
        "Bearer": {"description": "What is asked for.", "required": True, "schema": {"const": "Bearer"}},
    }
