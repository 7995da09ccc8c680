"""Answers that are not streams (JSON and errors), and the reading of JSON bodies."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Generic, NoReturn, ParamSpec, TypeVar

import anyio.to_thread
from pydantic import Field
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope
from typing_extensions import TypedDict

from rbee_worker.errors import BodyEncoded, InvalidRequest, RbeeError
from rbee_worker.events import InferenceFailed, to_dict
from rbee_worker.server import sse
from rbee_worker.server.words import in_words

INFERENCE_PATH = "/v1/inference"
RETRY_SECONDS = 5
MAX_RETRY_SECONDS = 60

_INLINE = 16_384
"""Bytes. To handle so much text takes about a millisecond; to pass it to another thread would cost more."""

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
"""Status -> ``error.type``. Other 4xx are ``invalid_request_error``, other 5xx ``server_error``."""

_CLOSING = frozenset({408, 413})
"""Statuses after which the connection is closed, because the rest of the body may still arrive."""

ALWAYS = 2**62
"""A size for :func:`off_loop` that means: use a thread. For work that is always slow, such as compiling a grammar."""

OPENAI_CODES: Mapping[str, str] = {
    "CONTEXT_TOO_LONG": "context_length_exceeded",
    "MODEL_NOT_FOUND": "model_not_found",
    "UNAUTHORIZED": "invalid_api_key",
    "QUEUE_FULL": "rate_limit_exceeded",
}
"""The worker's code of an error -> ``error.code`` of OpenAI, for OpenAI's routes."""

_OPENAI_PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses")
_FINAL = frozenset({409, 504})
"""Statuses after which OpenAI's clients would try again, although that does not help here."""

P = ParamSpec("P")
T = TypeVar("T")


class Json(Response, Generic[T]):
    """A JSON answer of the shape ``T``, usually a TypedDict. Dataclasses in it become objects."""

    media_type = "application/json"

    def __init__(self, content: T, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(content, status_code, headers)

    def render(self, content: Any) -> bytes:
        """The content as JSON, in UTF-8, without spaces."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=asdict)
        return text.encode()


class BadField(TypedDict):
    """One bad field of a request: its name, the constraint it breaks, and a sentence about it."""

    field: str
    constraint: str
    message: str


class ErrorDetail(TypedDict):
    """What is wrong, for people and for programs."""

    message: Annotated[str, Field(description="For people; never holds the text of a prompt.")]
    type: Annotated[str, Field(description="The class of the error.")]
    param: Annotated[str | None, Field(description="The first bad field, or null.")]
    code: Annotated[str, Field(description="For programs.")]


class ErrorEnvelope(TypedDict):
    """Every error."""

    error: ErrorDetail
    errors: Annotated[list[BadField], Field(description="Every bad field of the request; empty for other errors.")]


def envelope(error: RbeeError, codes: Mapping[str, str] | None = None) -> ErrorEnvelope:
    """The JSON body of an error: ``error`` as OpenAI's clients read it, and ``errors`` with every bad field.

    ``codes``: the worker's code -> the code to send instead.
    """
    fields = error.fields if isinstance(error, InvalidRequest) else ()
    status = error.http_status
    default = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004 - HTTP's class of statuses
    return {
        "error": {
            "message": in_words(error),
            "type": _TYPES.get(status, default),
            "param": fields[0].field if fields else None,
            "code": (codes or {}).get(error.code, error.code),
        },
        "errors": [{"field": f.field, "constraint": f.constraint, "message": f.message} for f in fields],
    }


def inference_failed(error: RbeeError) -> bytes:
    """The terminal SSE frame of a job that failed with ``error``."""
    return sse.frame(to_dict(InferenceFailed(code=error.code, message=in_words(error))))


def error_response(scope: Scope, error: RbeeError, headers: Mapping[str, str] | None = None) -> Response:
    """The response for an error.

    It is the envelope as JSON. But on ``/v1/inference``, a client that accepts ``text/event-stream`` gets the frames of
    a failed stream, with the same status.
    """
    extra = dict(headers or {})
    if error.http_status in {429, 503}:
        extra["Retry-After"] = str(clamp_retry(error.retry_after))
    if error.http_status == 401:  # noqa: PLR2004 - Unauthorized
        extra["WWW-Authenticate"] = "Bearer"
    if error.http_status in _CLOSING:
        extra["Connection"] = "close"
    if scope["path"] == INFERENCE_PATH and accepts_event_stream(Headers(scope=scope)):
        return Response(inference_failed(error) + sse.DONE, error.http_status, {**sse.HEADERS, **extra})
    openai = scope["path"].startswith(_OPENAI_PATHS)
    if openai and error.http_status in _FINAL:
        extra["X-Should-Retry"] = "false"
    return Json(envelope(error, OPENAI_CODES if openai else None), error.http_status, extra)


def clamp_retry(seconds: float | None) -> int:
    """Whole seconds for ``Retry-After``, from 1 to 60. None gives the default, 5."""
    return max(1, min(MAX_RETRY_SECONDS, round(seconds))) if seconds is not None else RETRY_SECONDS


def accepts_event_stream(headers: Headers) -> bool:
    """Whether ``Accept`` names ``text/event-stream`` with a weight above 0. ``*/*`` does not count."""
    for item in ",".join(headers.getlist("accept")).split(","):
        media, *params = (part.strip().lower() for part in item.split(";"))
        if media == "text/event-stream":
            return not any(p.startswith("q=") and not p[2:].strip("0.") for p in params)
    return False


async def off_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function, in a thread if ``size``, the bytes or characters that it handles, is large."""
    if size <= _INLINE:
        return function(*args, **kwargs)
    return await anyio.to_thread.run_sync(functools.partial(function, *args, **kwargs))


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body.

    The content type is ignored, because ``curl -d`` sends ``application/x-www-form-urlencoded`` for JSON too. A byte
    order mark is skipped. ``NaN``, ``Infinity`` and repeated keys are refused, because parsers disagree about them.

    Raises:
        InvalidRequest: the body is empty, not UTF-8, not JSON, nested too deeply, or not an object.
        BodyEncoded: the body is compressed.
    """
    body = await request.body()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        raise BodyEncoded("Compressed bodies are not read.", hint="Send it without Content-Encoding.")
    return await off_loop(len(body), parse_object, body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a body, as :func:`read_object` says. Messages name positions, but never repeat the text."""
    if not body.strip():
        raise InvalidRequest("The body is empty; a JSON object is expected.")
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except InvalidRequest:
        raise
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8: bad byte at position {error.start}.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"The body is not valid JSON: {error.msg} at {where}.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError:
        # Python does not read integers of thousands of digits.
        raise InvalidRequest("The body holds a number that is too long.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body is valid JSON but not an object.")
    return value


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: it holds {name}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise InvalidRequest("The body repeats a key in an object.")
    return out
