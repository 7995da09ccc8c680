"""Every error the worker raises on purpose.

::

    RbeeError                    1   500  INTERNAL_ERROR
    ├── InvalidRequest           2   400  INVALID_REQUEST      a field is missing, malformed or out of range
    │   └── ContextTooLong       2   400  CONTEXT_TOO_LONG     the prompt does not fit the context
    ├── ModelError
    │   ├── ModelNotFound        3   404  MODEL_NOT_FOUND      no such file, folder, package or hub id
    │   ├── ModelMalformed       3   422  MODEL_MALFORMED      a file of the model is damaged or inconsistent
    │   ├── ModelUnsupported     4   422  MODEL_UNSUPPORTED    well-formed, but not something this worker runs
    │   ├── OutOfMemory          5   507  OUT_OF_MEMORY        does not fit on the device
    │   └── DiskFull             1   507  DISK_FULL            a download does not fit on the disk
    ├── DeviceUnavailable        2   400  DEVICE_UNAVAILABLE   the named device is not on this machine
    ├── WorkerUnreachable        6   502  WORKER_UNREACHABLE   --addr: nobody answers there
    ├── Cancelled              130   409  CANCELLED            interrupted by the user
    ├── InferenceError           1   500  INFERENCE_FAILED     a step failed, or there is no model to run
    │   ├── DeadlineExceeded     1   504  DEADLINE_EXCEEDED    the job took longer than its timeout
    │   └── ModelNotLoaded       1   503  INFERENCE_FAILED     (503 with Retry-After)
    └── RequestRefused
        ├── Unauthorized         1   401  UNAUTHORIZED
        ├── Forbidden            1   403  FORBIDDEN
        ├── NotFound             1   404  NOT_FOUND
        ├── MethodNotAllowed     1   405  METHOD_NOT_ALLOWED
        ├── Conflict             1   409  CONFLICT             the job id runs already, a load runs already
        ├── RequestTimeout       1   408  REQUEST_TIMEOUT      the request body did not arrive in time
        ├── BodyTooLarge         1   413  BODY_TOO_LARGE
        ├── BodyEncoded          1   415  BODY_ENCODED         the request body is compressed
        ├── HeadersTooLarge      1   431  HEADERS_TOO_LARGE
        ├── QueueFull            1   429  QUEUE_FULL           (Retry-After)
        └── Unavailable          1   503  UNAVAILABLE          loading or draining (Retry-After)

The columns are the exit code, the HTTP status and the code. The message tells people what is wrong, with the file, the
field and the figure. The hint says what to do. Neither ever holds the text of a prompt, and neither names an option or
a route. Settings that would help are remedies; the command line and the server put them into words.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from rbee_worker.escape import printable

Setting = Literal["device", "dtype", "quantize", "max_context", "kv_cache_memory"]
"""Names of settings: fields of :class:`rbee_worker.config.EngineConfig`."""

Say = Callable[[Setting, str | int], str]
"""(setting, value) -> how a user sets it, such as ``--device cpu``."""


def sentence(text: str) -> str:
    """The text, with a full stop at its end if it has none. For messages of libraries and of the system."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


@dataclass(frozen=True, slots=True)
class Remedy:
    """Settings that would help, together.

    Attributes:
        settings: name -> value; a size is a text such as ``512MiB``.
        takes_mb: MiB of memory that the model would take with them; None: the error is not about memory.
    """

    settings: Mapping[Setting, str | int]
    takes_mb: int | None = None

    def in_words(self, say: Say) -> str:
        """The settings, as ``say`` puts them, and the memory that the model would take."""
        words = " ".join(say(name, value) for name, value in self.settings.items())
        return words if self.takes_mb is None else f"{words} ({self.takes_mb:,} MiB)"


def _as_data(name: Setting, value: str | int) -> str:
    return f"{name}={value}"


class RbeeError(Exception):
    """Base: a message, an optional hint, remedies, and the codes that each surface needs."""

    code: ClassVar[str] = "INTERNAL_ERROR"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        remedies: Sequence[Remedy] = (),
        retry_after: int | None = None,
    ) -> None:
        # Paths and whatever else a message names may hold anything, and it is shown on terminals and in logs.
        self.message = printable(message)
        self.hint = None if hint is None else printable(hint)
        super().__init__(self.message)
        self.remedies = tuple(remedies)
        self.retry_after = retry_after

    def __str__(self) -> str:
        advice = self.advice()
        return f"{sentence(self.message)} {advice}" if advice else self.message

    def advice(self, say: Say = _as_data) -> str:
        """What to do: the hint, then the remedies. ``say`` puts their settings into words."""
        ways = [remedy.in_words(say) for remedy in self.remedies]
        if any(remedy.takes_mb is not None for remedy in self.remedies):
            told = f"What would fit: {'; '.join(ways)}."
        else:
            told = f"Use {' or '.join(ways)}." if ways else ""
        return " ".join(filter(None, (self.hint, told)))


@dataclass(frozen=True, slots=True)
class FieldError:
    """One bad field of a request: its name, the constraint it breaks, and a sentence about it."""

    field: str
    constraint: str
    message: str


class InvalidRequest(RbeeError):
    """A field or an option is missing, of the wrong type or out of range; `errors` lists each."""

    code = "INVALID_REQUEST"
    exit_code = 2
    http_status = 400

    def __init__(
        self,
        message: str,
        *,
        fields: Sequence[FieldError] = (),
        hint: str | None = None,
        remedies: Sequence[Remedy] = (),
    ) -> None:
        super().__init__(message, hint=hint, remedies=remedies)
        self.fields = tuple(fields)


class ContextTooLong(InvalidRequest):
    """The prompt leaves no room in the context."""

    code = "CONTEXT_TOO_LONG"


class ModelError(RbeeError):
    """Something is wrong with the model that was named."""


class ModelNotFound(ModelError):
    """No such file, folder, package or hub id."""

    code = "MODEL_NOT_FOUND"
    exit_code = 3
    http_status = 404


class ModelMalformed(ModelError):
    """A file of the model is damaged, missing or inconsistent with another."""

    code = "MODEL_MALFORMED"
    exit_code = 3
    http_status = 422


class ModelUnsupported(ModelError):
    """The model is well-formed but not one this worker runs."""

    code = "MODEL_UNSUPPORTED"
    exit_code = 4
    http_status = 422


class OutOfMemory(ModelError):
    """The model does not fit where it was to go."""

    code = "OUT_OF_MEMORY"
    exit_code = 5
    http_status = 507


class DiskFull(ModelError):
    """The model does not fit on the disk that it is downloaded to."""

    code = "DISK_FULL"
    http_status = 507


class DeviceUnavailable(RbeeError):
    """The named device is not on this machine."""

    code = "DEVICE_UNAVAILABLE"
    exit_code = 2
    http_status = 400


class WorkerUnreachable(RbeeError):
    """Nobody answers at ``--addr``, or what answers is no worker."""

    code = "WORKER_UNREACHABLE"
    exit_code = 6
    http_status = 502


class Cancelled(RbeeError):
    """Interrupted by the user."""

    code = "CANCELLED"
    exit_code = 130
    http_status = 409


class InferenceError(RbeeError):
    """The model failed while it made the text."""

    code = "INFERENCE_FAILED"


class DeadlineExceeded(InferenceError):
    """The job took longer than its timeout."""

    code = "DEADLINE_EXCEEDED"
    http_status = 504


class ModelNotLoaded(InferenceError):
    """There is no model to run."""

    http_status = 503


class RequestRefused(RbeeError):
    """The server refuses a request for a reason other than its fields."""


class Unauthorized(RequestRefused):
    """The API key is missing or wrong."""

    code = "UNAUTHORIZED"
    http_status = 401


class Forbidden(RequestRefused):
    """The client may not ask for this."""

    code = "FORBIDDEN"
    http_status = 403


class NotFound(RequestRefused):
    """No such route or thing."""

    code = "NOT_FOUND"
    http_status = 404


class MethodNotAllowed(RequestRefused):
    """The route exists, the method does not."""

    code = "METHOD_NOT_ALLOWED"
    http_status = 405


class Conflict(RequestRefused):
    """It runs already."""

    code = "CONFLICT"
    http_status = 409


class RequestTimeout(RequestRefused):
    """The request body did not arrive in time."""

    code = "REQUEST_TIMEOUT"
    http_status = 408


class BodyTooLarge(RequestRefused):
    """The request body is over the limit."""

    code = "BODY_TOO_LARGE"
    http_status = 413


class BodyEncoded(RequestRefused):
    """The request body is compressed."""

    code = "BODY_ENCODED"
    http_status = 415


class HeadersTooLarge(RequestRefused):
    """The request's head is over the limit."""

    code = "HEADERS_TOO_LARGE"
    http_status = 431


class QueueFull(RequestRefused):
    """As many requests wait as are allowed to."""

    code = "QUEUE_FULL"
    http_status = 429


class Unavailable(RequestRefused):
    """Loading or draining."""

    code = "UNAVAILABLE"
    http_status = 503


def error_of(
    code: str, message: str, *, status: int | None = None, hint: str | None = None, retry_after: int | None = None
) -> RbeeError:
    """The error with this code; for an unknown code, the one with this HTTP status."""
    tree = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, RbeeError)]
    named = [kind for kind in tree if kind.code == code.upper() and "code" in vars(kind)]
    if code == InferenceError.code and status == ModelNotLoaded.http_status:
        named = [ModelNotLoaded]
    by_status = [kind for kind in RequestRefused.__subclasses__() if kind.http_status == status]
    kind: type[RbeeError] = [*named, *by_status, RbeeError][0]
    error = kind(message, hint=hint)
    error.retry_after = retry_after
    return error
