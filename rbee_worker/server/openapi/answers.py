"""The shapes of answers, for their description: what the routes send, checked against it by the tests.

A field whose default is None is left out of an answer rather than sent as null; every other field is always there.
"""

from dataclasses import dataclass
from typing import Literal

from rbee_worker.runtime.machine.devices import DeviceInfo
from rbee_worker.worker.worker import State


@dataclass(frozen=True, slots=True)
class BadField:
    """One bad field of a request: its name, the constraint it breaks, and a sentence about it."""

    field: str
    constraint: str
    message: str


@dataclass(frozen=True, slots=True)
class ErrorDetail:
    """What is wrong, for people and for programs.

    Attributes:
        message: for people; never holds the text of a prompt.
        type: the class of the error.
        param: the first bad field, or null.
        code: for programs.
    """

    message: str
    type: str
    param: str | None
    code: str


@dataclass(frozen=True, slots=True)
class ErrorEnvelope:
    """Every error.

    Attributes:
        errors: every bad field of the request; empty for other errors.
    """

    error: ErrorDetail
    errors: list[BadField]


@dataclass(frozen=True, slots=True)
class FailedChunk:
    """The error with which a stream of chunks ends when it fails."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class Index:
    """Who answers here."""

    name: Literal["rbee-worker"]
    version: str
    ready_url: str


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the worker is well.

    Attributes:
        vram_bytes: memory of the weights, those of a load under way included.
        reason: why the worker is unhealthy.
        code: of the error of the load that failed.
    """

    status: Literal["healthy", "unhealthy"]
    state: State
    vram_bytes: int
    reason: str | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Life:
    """Whether the engine's thread lives.

    Attributes:
        reason: why it does not.
    """

    status: Literal["alive", "dead"]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ReadyStatus:
    """Whether requests would be served now, as a status."""

    ready: bool
    state: State | None = None


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether requests would be served now, in words.

    Attributes:
        progress_url: where the load's events are, once a load was asked for.
    """

    ready: bool
    state: Literal["idle", "busy"] | State
    model_loaded: bool | None = None
    progress_url: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """The worker, its model and its devices.

    Attributes:
        id: a UUID, new at each start.
        model: null without a model.
        context_length: tokens of prompt and output together at most; null without a model.
        loading: whether a load runs.
        vram_bytes: memory of the weights, those of a load under way included.
        running: requests with a place in the batch.
        queued: requests waiting for one.
    """

    id: str
    version: str
    model: str | None
    context_length: int | None
    state: State
    loading: bool
    devices: list[DeviceInfo]
    vram_bytes: int
    running: int
    queued: int
    uptime_seconds: float


@dataclass(frozen=True, slots=True)
class LoadAccepted:
    """The load has begun.

    Attributes:
        progress_url: where its events are.
        resident_keeps_serving: whether the model that serves goes on until the new one is ready.
    """

    progress_url: str
    model: str
    resident_keeps_serving: bool


@dataclass(frozen=True, slots=True)
class CancelAccepted:
    """The load is being cancelled.

    Attributes:
        progress_url: where its events are.
    """

    progress_url: str


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The model is gone.

    Attributes:
        vram_bytes_freed: 0 when there was none.
    """

    vram_bytes_freed: int


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The ids of a text's tokens."""

    tokens: list[int]


@dataclass(frozen=True, slots=True)
class DecodedText:
    """The text of token ids; special tokens are written out."""

    text: str
