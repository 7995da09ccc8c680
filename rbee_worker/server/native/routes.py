"""The worker's own routes: inference, loading, tokens, and the worker's state."""

import functools
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NotRequired, cast

import anyio.to_thread
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from rbee_worker import __version__
from rbee_worker.config import DEFAULT_MODEL, ServerConfig
from rbee_worker.errors import (
    Cancelled,
    Conflict,
    DeviceUnavailable,
    FieldError,
    Forbidden,
    InvalidRequest,
    ModelMalformed,
    ModelNotFound,
    ModelNotLoaded,
    ModelUnsupported,
    NotFound,
    Unavailable,
)
from rbee_worker.events import InferenceEvent, LoadCancelled, LoadFailed, LoadingEvent, LoadReport, Ready
from rbee_worker.runtime.machine.devices import DeviceInfo, list_devices
from rbee_worker.server.http.access import client_of
from rbee_worker.server.http.envelope import ALWAYS, INFERENCE_PATH, Json, inference_failed, off_loop, read_object
from rbee_worker.server.http.operation import ERRORS_OF_JOBS, Operation
from rbee_worker.server.native.bodies import DetokenizeBody, InferenceBody, LoadingBody, TokenizeBody
from rbee_worker.server.native.frames import SharedFrames, Watcher, inference_frames
from rbee_worker.server.observe.metrics import CONTENT_TYPE, WorkerMetrics
from rbee_worker.server.sse import EventStream
from rbee_worker.server.streams import Streams
from rbee_worker.server.words import in_words
from rbee_worker.worker.history import KEPT_LOADS, PastLoad
from rbee_worker.worker.worker import State, Worker

PROGRESS_PATH = "/v1/loading/progress"

_DEAD = "The engine's thread has died; the log says why. Restart the worker."

Outcome = Literal["ready", "error", "cancelled"]
ProgressUrl = Annotated[str, Field(description="Where its events are.")]
VramBytes = Annotated[int, Field(description="Memory of the weights, those of a load under way included.")]


class LoadAccepted(TypedDict):
    """The load has begun."""

    progress_url: ProgressUrl
    model: str
    resident_keeps_serving: Annotated[
        bool, Field(description="Whether the model that serves goes on until the new one is ready.")
    ]


class CancelAccepted(TypedDict):
    """The load is being cancelled."""

    progress_url: ProgressUrl


class EndedLoad(TypedDict):
    """What a load came to."""

    model: Annotated[str, Field(description="The model that was asked for, as it was named.")]
    started_at: Annotated[str, Field(description="UTC, RFC 3339 with milliseconds.")]
    outcome: Outcome
    elapsed_seconds: Annotated[float, Field(description="From its beginning to its end.")]
    report: NotRequired[Annotated[LoadReport, Field(description="What `ready` carried.")]]
    code: NotRequired[Annotated[str, Field(description="The code of the error; `CANCELLED` where it was cancelled.")]]
    message: NotRequired[Annotated[str, Field(description="Why the load failed.")]]
    vram_mb_freed: NotRequired[Annotated[int, Field(description="MiB of weights that a cancelled load gave back.")]]


class LoadingHistory(TypedDict):
    """The last loads that have ended."""

    loads: Annotated[list[EndedLoad], Field(description=f"The newest first, {KEPT_LOADS} at most.")]


class Unloaded(TypedDict):
    """The model is gone."""

    vram_bytes_freed: Annotated[int, Field(description="0 when there was none.")]


class Index(TypedDict):
    """Who answers here."""

    name: Literal["rbee-worker"]
    version: str
    ready_url: str


class Health(TypedDict):
    """Whether the worker is well."""

    status: Literal["healthy", "unhealthy"]
    state: State
    vram_bytes: VramBytes
    reason: NotRequired[Annotated[str, Field(description="Why the worker is unhealthy.")]]
    code: NotRequired[Annotated[str, Field(description="The code of the error with which the load failed.")]]


class Life(TypedDict):
    """Whether the engine's thread lives."""

    status: Literal["alive", "dead"]
    reason: NotRequired[Annotated[str, Field(description="Why it does not.")]]


class ReadyStatus(TypedDict):
    """Whether requests would be served now, as a status."""

    ready: bool
    state: NotRequired[State]


class Readiness(TypedDict):
    """Whether requests would be served now, in words."""

    ready: bool
    state: Literal["idle", "busy"] | State
    model_loaded: NotRequired[bool]
    progress_url: NotRequired[
        Annotated[str, Field(description="Where the load's events are, once a load was asked for.")]
    ]


class WorkerDescription(TypedDict):
    """The worker, its model and its devices."""

    id: Annotated[str, Field(description="A UUID, new at each start.")]
    version: str
    model: Annotated[str | None, Field(description="Null without a model.")]
    context_length: Annotated[
        int | None, Field(description="Tokens of prompt and output together at most; null without a model.")
    ]
    state: State
    loading: Annotated[bool, Field(description="Whether a load runs.")]
    devices: list[DeviceInfo]
    vram_bytes: VramBytes
    running: Annotated[int, Field(description="Requests with a place in the batch.")]
    queued: Annotated[int, Field(description="Requests waiting for one.")]
    uptime_seconds: float


class TokenIds(TypedDict):
    """The ids of a text's tokens."""

    tokens: list[int]


class DecodedText(TypedDict):
    """The text of token ids; special tokens are written out."""

    text: str


@dataclass(frozen=True, slots=True)
class AllowedModels:
    """The models that clients may load. Without this check any request could make the worker read any file.

    Attributes:
        start: the model given at start; None: the default model.
        others: the models of ``--allow-model``.
        has_start: whether the worker was started with a model. If not, ``start`` is not used.
    """

    start: str | None
    others: tuple[str, ...] = ()
    has_start: bool = True

    def choose(self, asked: str | None) -> str | None:
        """The model to load for a request that names ``asked``; None: the default model.

        Raises:
            InvalidRequest: the request names no model, and the worker was started without one.
            Forbidden: the model is not allowed.
        """
        if asked is None:
            if self.has_start:
                return self.start
            field = FieldError("model", "required", "model is required: the worker was started without one.")
            raise InvalidRequest(field.message, fields=[field])
        if self.has_start and asked == (self.start or DEFAULT_MODEL):
            return self.start
        if asked in self.others:
            return asked
        hint = "Start the worker with --allow-model for each model that clients may load."
        raise Forbidden("This worker does not load that model for clients.", hint=hint)


class Native:
    """The handlers. An application has one instance.

    Attributes:
        streams: makes the streams of all routes.
    """

    def __init__(self, worker: Worker, config: ServerConfig, models: AllowedModels, metrics: WorkerMetrics) -> None:
        self._worker = worker
        self._config = config
        self._models = models
        self._shared_frames = SharedFrames()
        self._metrics = metrics
        self.streams = Streams(worker, config)

    # -- inference

    @Operation(
        "POST",
        INFERENCE_PATH,
        tag="inference",
        body=InferenceBody,
        frames=(InferenceEvent,),
        errors=ERRORS_OF_JOBS,
        streams_errors=True,
    )
    async def infer(self, request: Request) -> EventStream:
        """Generate text, streamed.

        Whatever can be refused is refused before the stream begins. A client that leaves ends its job.
        """
        size = len(await request.body())
        body = await off_loop(size, InferenceBody.parse, await read_object(request))
        asked = replace(await off_loop(size, body.to_request), client=client_of(request.scope))
        if asked.sampling.grammar is not None:
            size = ALWAYS
        submit = functools.partial(self._worker.submit, asked)
        return await self.streams.of_jobs(size, submit, inference_frames, inference_failed)

    @Operation(
        "DELETE",
        INFERENCE_PATH + "/{job_id:path}",
        tag="inference",
        parameters={"job_id": "The job's id, or the id of one of OpenAI's responses."},
        statuses=(204,),
    )
    async def cancel_job(self, request: Request) -> Response:
        """Cancel a job.

        204 whether or not there is such a job. Its stream ends with `end`, `cancelled`.
        """
        self._worker.cancel(request.path_params["job_id"])
        return Response(status_code=204)

    # -- loading

    @Operation("GET", PROGRESS_PATH, tag="loading", frames=(LoadingEvent,), errors=(Unavailable,))
    async def progress(self, _request: Request) -> EventStream:
        """The load's events, streamed.

        The latest state first, then what follows, to the terminal event. Leaving cancels nothing.
        """
        watcher = Watcher(self._worker.loads.progress(), self._shared_frames)
        return self.streams.of(watcher.frames(), watcher.failed)

    @Operation(
        "POST",
        "/v1/loading",
        tag="loading",
        body=LoadingBody,
        statuses=(202,),
        errors=(DeviceUnavailable, ModelNotFound, Conflict, ModelMalformed, ModelUnsupported, Unavailable),
    )
    async def load(self, request: Request) -> Json[LoadAccepted]:
        """Load a model.

        Answers at once. A model that serves goes on where both fit; else it is unloaded first.
        """
        body = LoadingBody.parse(await read_object(request))
        model = self._models.choose(body.model)
        keeps = await anyio.to_thread.run_sync(self._worker.loads.begin, model, body.settings)  # reads headers
        answer: LoadAccepted = {
            "progress_url": PROGRESS_PATH,
            "model": model or DEFAULT_MODEL,
            "resident_keeps_serving": keeps,
        }
        return Json(answer, 202, {"Location": PROGRESS_PATH})

    @Operation("DELETE", "/v1/loading", tag="loading", statuses=(202,), errors=(NotFound,))
    async def cancel_load(self, _request: Request) -> Json[CancelAccepted]:
        """Cancel the load."""
        if not self._worker.loads.cancel():
            raise NotFound("Nothing is being loaded.")
        return Json({"progress_url": PROGRESS_PATH}, 202)

    @Operation("GET", "/v1/loading/history", tag="loading")
    async def history(self, _request: Request) -> Json[LoadingHistory]:
        """What the last loads came to.

        The newest first; those that failed or were cancelled too. The worker keeps them until it ends.
        """
        return Json({"loads": [_ended(load) for load in self._worker.loads.history]})

    @Operation("POST", "/v1/unload", tag="loading", errors=(Conflict, Unavailable))
    async def unload(self, _request: Request) -> Json[Unloaded]:
        """Free the model's memory.

        Running jobs end first. No body is needed.
        """
        freed = await anyio.to_thread.run_sync(self._worker.loads.unload)  # waits for the jobs
        return Json({"vram_bytes_freed": freed})

    # -- the worker

    @Operation("GET", "/", tag="worker")
    async def index(self, _request: Request) -> Json[Index]:
        """Who answers here."""
        # It needs no key, so it says no more.
        return Json({"name": "rbee-worker", "version": __version__, "ready_url": "/v1/ready"})

    @Operation("GET", "/health", tag="worker", statuses=(200, 503))
    async def health(self, _request: Request) -> Json[Health]:
        """Whether the worker is well.

        503 when its load failed and left it without a model, or when its engine died.
        """
        worker = self._worker
        if worker.engine.alive and worker.state != "failed":
            return Json({"status": "healthy", "state": worker.state, "vram_bytes": worker.vram_bytes})
        answer: Health = {"status": "unhealthy", "state": "failed", "vram_bytes": worker.vram_bytes}
        error = worker.loads.error
        if not worker.engine.alive:
            answer["reason"] = _DEAD
        elif error is None:
            answer["reason"] = "The load failed."
        else:
            answer["reason"], answer["code"] = in_words(error), error.code
        return Json(answer, 503)

    @Operation("GET", "/livez", tag="worker", statuses=(200, 503))
    async def livez(self, _request: Request) -> Json[Life]:
        """Whether the process is worth keeping.

        503 when its engine's thread has died: restart it.
        """
        if self._worker.engine.alive:
            return Json({"status": "alive"})
        return Json({"status": "dead", "reason": _DEAD}, 503)

    @Operation("GET", "/readyz", tag="worker", statuses=(200, 503))
    async def readyz(self, _request: Request) -> Json[ReadyStatus]:
        """Whether requests would be served, as a status."""
        if self._serves():
            return Json({"ready": True})
        answer: ReadyStatus = {"ready": False, "state": self._worker.state}
        return Json(answer, 503, {"Retry-After": str(self._worker.retry_after())})

    @Operation("GET", "/v1/ready", tag="worker")
    async def ready(self, _request: Request) -> Json[Readiness]:
        """The same in words, always 200."""
        worker = self._worker
        if self._serves():
            busy = len(worker.jobs) > 0
            return Json({"ready": True, "state": "busy" if busy else "idle", "model_loaded": True})
        answer: Readiness = {"ready": False, "state": worker.state if worker.engine.alive else "failed"}
        if worker.loads.running or worker.loads.latest is not None:
            answer["progress_url"] = PROGRESS_PATH
        return Json(answer)

    @Operation("GET", "/metrics", tag="worker", media_type="text/plain")
    async def metrics(self, _request: Request) -> Response:
        """Figures for Prometheus."""
        devices = await anyio.to_thread.run_sync(self._worker.memory)  # asks drivers
        return Response(self._metrics.render(devices), headers={"Content-Type": CONTENT_TYPE})

    @Operation("GET", "/v1/worker", tag="worker")
    async def describe(self, _request: Request) -> Json[WorkerDescription]:
        """The worker, its model and devices."""
        devices = await anyio.to_thread.run_sync(list_devices)  # asks drivers
        worker, model = self._worker, self._worker.engine.model
        answer: WorkerDescription = {
            "id": worker.id,
            "version": __version__,
            "model": model.name if model is not None else None,
            "context_length": model.context_length if model is not None else None,
            "state": worker.state,
            "loading": worker.loads.running,
            "devices": devices,
            "vram_bytes": worker.vram_bytes,
            "running": worker.jobs.running,
            "queued": worker.jobs.queued,
            "uptime_seconds": round(worker.uptime_seconds, 3),
        }
        return Json(answer)

    @Operation("POST", "/tokenize", tag="tokens", body=TokenizeBody, errors=(Unavailable, ModelNotLoaded))
    async def tokenize(self, request: Request) -> Json[TokenIds]:
        """Text to token ids."""
        size = len(await request.body())
        body = await off_loop(size, TokenizeBody.parse, await read_object(request))
        tokenizer = self._worker.tokenizer()
        encode = functools.partial(tokenizer.encode, body.text, add_special_tokens=body.add_special)
        return Json({"tokens": await off_loop(size, encode)})

    @Operation("POST", "/detokenize", tag="tokens", body=DetokenizeBody, errors=(Unavailable, ModelNotLoaded))
    async def detokenize(self, request: Request) -> Json[DecodedText]:
        """Token ids to text."""
        size = len(await request.body())
        body = await off_loop(size, DetokenizeBody.parse, await read_object(request))
        tokenizer = self._worker.tokenizer()
        if max(body.tokens, default=0) >= tokenizer.vocab_size:
            constraint = f"token ids below {tokenizer.vocab_size}"
            field = FieldError("tokens", constraint, f"tokens must be {constraint}.")
            raise InvalidRequest(field.message, fields=[field])
        decode = functools.partial(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return Json({"text": await off_loop(size, decode)})

    # -- helpers

    def _serves(self) -> bool:
        return self._worker.serves


def _ended(load: PastLoad) -> EndedLoad:
    end = load.end
    answer: EndedLoad = {
        "model": load.model,
        "started_at": load.started_at,
        "outcome": cast("Outcome", end.stage),
        "elapsed_seconds": end.elapsed_seconds,
    }
    if isinstance(end, Ready):
        answer["report"] = end.report
    elif isinstance(end, LoadFailed):
        answer["code"], answer["message"] = end.code, end.message
    elif isinstance(end, LoadCancelled):
        answer["code"], answer["vram_mb_freed"] = Cancelled.code, end.vram_mb_freed
    return answer
