"""Operation: a decorator that describes a handler: its method and path, what it takes, and what it answers.

The routes and the OpenAPI document are both made from it, so every route is described.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final, TypeVar, get_args, get_origin

from starlette.routing import Route

from rbee_worker.errors import Conflict, ContextTooLong, ModelNotLoaded, QueueFull, RbeeError, Unavailable
from rbee_worker.server.http.envelope import Json
from rbee_worker.server.http.fields import Body

Errors = tuple[type[RbeeError], ...]
Handler = TypeVar("Handler", bound=Callable[..., Any])

ERRORS_OF_JOBS: Final[Errors] = (ContextTooLong, Conflict, QueueFull, Unavailable, ModelNotLoaded)
"""Errors with which a job may be refused."""


@dataclass(frozen=True, slots=True)
class Operation:
    """Makes the method below it a handler.

    The rest of the description stands in the handler. The first line of its docstring is the operation's summary; the
    rest is the description, in Markdown. Its return annotation gives the shape of JSON answers: a ``Json[...]``.

    Attributes:
        method: the HTTP method. ``GET`` answers ``HEAD`` too.
        path: the path in Starlette's form.
        tag: the group in which the document lists it.
        parameters: name of a part of the path -> what it means.
        body: the shape of the request's body; None: it takes no body.
        statuses: the statuses of answers that are not errors.
        frames: the shapes of the frames of its streams; empty: it sends no streams.
        media_type: of answers that are text; None: it has no such answers.
        errors: the errors that the handler may answer with.
        streams_errors: whether errors may also be sent as frames.
    """

    method: str
    path: str
    _: KW_ONLY
    tag: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    body: type[Body] | None = None
    statuses: tuple[int, ...] = (200,)
    frames: tuple[type, ...] = ()
    media_type: str | None = None
    errors: Errors = ()
    streams_errors: bool = False

    def __call__(self, handler: Handler) -> Handler:
        """Attach this operation to a handler, and return the handler."""
        handler.__dict__["operation"] = self
        return handler


def operation_of(handler: object) -> Operation | None:
    """The operation of a handler; None: it has none."""
    operation = getattr(handler, "operation", None)
    return operation if isinstance(operation, Operation) else None


def json_shape(handler: Callable[..., Any]) -> Any:
    """The shape of a handler's JSON answers; None: it has none."""
    returned = handler.__annotations__.get("return")
    shapes = [get_args(part)[0] for part in (returned, *get_args(returned)) if get_origin(part) is Json]
    return shapes[0] if shapes else None


def routes(handlers: object) -> list[Route]:
    """The routes of an object: one for each method with an operation, in the order of the class."""
    found = {name: operation for name, member in vars(type(handlers)).items() if (operation := operation_of(member))}
    return [Route(one.path, getattr(handlers, name), methods=[one.method]) for name, one in found.items()]
