"""What a handler does, written above it: its method and path, and what it takes and answers.

The routes and the OpenAPI document are both made from that, so a route is never without its description.
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
"""Why a job may be refused."""


@dataclass(frozen=True, slots=True)
class Operation:
    """Makes the method that it stands above a handler.

    The rest stands in the handler itself. The first line of its docstring is the operation's summary, what follows is
    the description, in Markdown. The shape of its JSON answers is what it says that it returns: a ``Json[...]``.

    Attributes:
        method: of HTTP; ``GET`` answers ``HEAD`` too.
        path: as Starlette takes it.
        tag: the group it is listed in.
        parameters: the parts of the path, each with what it means.
        body: the shape of the request's body; None: there is none.
        statuses: those of its answers that are no errors.
        frames: the shapes of what the frames of its streams hold; empty: there are no streams.
        media_type: of answers that are text; None: there are none.
        errors: those that its handler may answer with.
        streams_errors: whether errors may come as frames, too.
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
        """The handler, with this operation."""
        handler.__dict__["operation"] = self
        return handler


def operation_of(handler: object) -> Operation | None:
    """The operation that stands above a handler; None: there is none."""
    operation = getattr(handler, "operation", None)
    return operation if isinstance(operation, Operation) else None


def json_shape(handler: Callable[..., Any]) -> Any:
    """The shape of a handler's JSON answers; None: it has none."""
    returned = handler.__annotations__.get("return")
    shapes = [get_args(part)[0] for part in (returned, *get_args(returned)) if get_origin(part) is Json]
    return shapes[0] if shapes else None


def routes(handlers: object) -> list[Route]:
    """The routes of an object: one for each method with an operation, in the order in which they stand."""
    found = {name: operation for name, member in vars(type(handlers)).items() if (operation := operation_of(member))}
    return [Route(one.path, getattr(handlers, name), methods=[one.method]) for name, one in found.items()]
