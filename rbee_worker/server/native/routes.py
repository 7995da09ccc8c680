"""The worker's own routes: inference, loading, and what the worker says of itself."""

import functools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rbee_worker import __version__
from rbee_worker.config import DEFAULT_MODEL, GenerationRequest, ServerConfig
from rbee_worker.errors import FieldError, Forbidden, InvalidRequest, NotFound
from rbee_worker.events import Event
from rbee_worker.server import sse
from rbee_worker.server.holding import Holding
from rbee_worker.server.http.access import client_of
from rbee_worker.server.http.envelope import ALWAYS, INFERENCE_PATH, off_loop, read_object
from rbee_worker.server.native.bodies import DetokenizeBody, InferenceBody, LoadingBody, TokenizeBody
from rbee_worker.server.observe.metrics import CONTENT_TYPE, WorkerMetrics
from rbee_worker.worker.worker import Worker

PROGRESS_PATH = "/v1/loading/progress"


@dataclass(frozen=True, slots=True)
class AllowedModels:
    """Which models clients may ask for: any request could otherwise make the worker read any file.

    Attributes:
        start: the model given at start; None: the embedded default.
        others: those of ``--allow-model``.
        has_start: False when the worker was started without a model: ``start`` means nothing then.
    """

    start: str | None
    others: tuple[str, ...] = ()
    has_start: bool = True

    def choose(self, asked: str | None) -> str | None:
        """The model to load for a request that names ``asked``; None: the embedded default.

        Raises:
            InvalidRequest: none is named and none was given at start.
            Forbidden: the model is not one of those allowed.
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
    """The handlers; one instance per application.

    Attributes:
        holding: the streaming requests that wait for a load.
        streams: those that are being sent now.
    """

    def __init__(self, worker: Worker, config: ServerConfig, models: AllowedModels, metrics: WorkerMetrics) -> None:
        self._worker = worker
        self._config = config
        self._models = models
        self._progress_frames = sse.SharedFrames()
        self._metrics = metrics
        self.holding = Holding(worker, config)
        self.streams: set[sse.EventStream] = set()

    def routes(self) -> list[Route]:
        """Every route of this module."""
        return [
            Route("/", self.index, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/livez", self.livez, methods=["GET"]),
            Route("/readyz", self.readyz, methods=["GET"]),
            Route("/v1/ready", self.ready, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/v1/worker", self.describe, methods=["GET"]),
            Route(PROGRESS_PATH, self.progress, methods=["GET"]),
            Route("/v1/loading", self.load, methods=["POST"]),
            Route("/v1/loading", self.cancel_load, methods=["DELETE"]),
            Route("/v1/unload", self.unload, methods=["POST"]),
            Route(INFERENCE_PATH, self.infer, methods=["POST"]),
            Route(f"{INFERENCE_PATH}/{{job_id:path}}", self.cancel_job, methods=["DELETE"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    # -- inference

    async def infer(self, request: Request) -> Response:
        """Stream one job. Everything that can be refused is refused here, before the 200 goes out."""
        size = len(await request.body())
        body = await off_loop(size, InferenceBody.parse, await read_object(request))
        asked = replace(body.to_request(), client=client_of(request.scope))
        if asked.sampling.grammar is not None:
            size = ALWAYS
        if self.holding.due():
            return self._stream(self._held(asked, size), sse.inference_failed)
        job = await off_loop(size, self._worker.submit, asked)
        return self._stream(job.events(), sse.inference_failed, on_close=job.cancel)

    async def _held(self, asked: GenerationRequest, size: int) -> AsyncIterator[Event]:
        """A job that begins when the load has ended; until then its stream is silent, and so kept alive."""
        job = await self.holding.begin(size, functools.partial(self._worker.submit, asked))
        async with aclosing(job):
            async for event in job:
                yield event

    async def cancel_job(self, request: Request) -> Response:
        """End a job; 204 whether or not there is one."""
        self._worker.cancel(request.path_params["job_id"])
        return Response(status_code=204)

    # -- loading

    async def progress(self, _request: Request) -> Response:
        """Stream the load's events: the latest state first. A watcher that leaves leaves the load alone."""
        return self._stream(self._worker.progress(), sse.loading_failed, encoder=self._progress_frames)

    async def load(self, request: Request) -> Response:
        """Begin a load; 202 at once."""
        body = LoadingBody.parse(await read_object(request))
        model = self._models.choose(body.model)
        begin = functools.partial(
            self._worker.load, model, device=body.device, dtype=body.dtype, quantize=body.quantize
        )
        keeps = await anyio.to_thread.run_sync(begin)  # reads headers
        answer = {"progress_url": PROGRESS_PATH, "model": model or DEFAULT_MODEL, "resident_keeps_serving": keeps}
        return JSONResponse(answer, 202, {"Location": PROGRESS_PATH})

    async def cancel_load(self, _request: Request) -> Response:
        """Cancel the running load; its stream says when that is done."""
        if not self._worker.cancel_load():
            raise NotFound("Nothing is being loaded.")
        return JSONResponse({"progress_url": PROGRESS_PATH}, 202)

    async def unload(self, _request: Request) -> Response:
        """Free the model's memory."""
        return JSONResponse({"vram_bytes_freed": await self._worker.unload()})

    # -- the worker

    async def index(self, _request: Request) -> Response:
        """Who answers here; open to all, so it says no more."""
        return JSONResponse({"name": "rbee-worker", "version": __version__, "ready_url": "/v1/ready"})

    async def health(self, _request: Request) -> Response:
        """Whether the worker is well: a load that failed, or a dead engine, is not."""
        worker = self._worker
        answer: dict[str, Any] = {"status": "healthy", "state": worker.state, "vram_bytes": worker.vram_bytes}
        if worker.engine_alive and worker.state != "failed":
            return JSONResponse(answer)
        answer.update(status="unhealthy", state="failed", **self._reason())
        return JSONResponse(answer, 503)

    async def livez(self, _request: Request) -> Response:
        """Whether the process is worth keeping: its engine's thread lives."""
        if self._worker.engine_alive:
            return JSONResponse({"status": "alive"})
        return JSONResponse({"status": "dead", **self._reason()}, 503)

    async def readyz(self, _request: Request) -> Response:
        """Whether requests would be served now, as a status."""
        if self._serves():
            return JSONResponse({"ready": True})
        answer = {"ready": False, "state": self._worker.state}
        return JSONResponse(answer, 503, {"Retry-After": str(self._worker.retry_after())})

    async def ready(self, _request: Request) -> Response:
        """Whether requests would be served now, in words; always 200."""
        worker = self._worker
        if self._serves():
            busy = worker.running > 0 or worker.queued > 0
            return JSONResponse({"ready": True, "state": "busy" if busy else "idle", "model_loaded": True})
        answer: dict[str, Any] = {"ready": False, "state": worker.state if worker.engine_alive else "failed"}
        if worker.loading or worker.last_loading_event is not None:
            answer["progress_url"] = PROGRESS_PATH
        return JSONResponse(answer)

    async def metrics(self, _request: Request) -> Response:
        """Figures for Prometheus, during a load too."""
        devices = await anyio.to_thread.run_sync(self._worker.memory)  # asks drivers
        return Response(self._metrics.render(devices), headers={"Content-Type": CONTENT_TYPE})

    async def describe(self, _request: Request) -> Response:
        """The worker, its model and its devices."""
        worker = self._worker
        devices = await anyio.to_thread.run_sync(worker.devices)  # asks drivers
        answer = {
            "id": worker.id,
            "version": __version__,
            "model": worker.model_name,
            "context_length": worker.context_length,
            "state": worker.state,
            "loading": worker.loading,
            "devices": [asdict(device) for device in devices],
            "vram_bytes": worker.vram_bytes,
            "running": worker.running,
            "queued": worker.queued,
            "uptime_seconds": round(worker.uptime_seconds, 3),
        }
        return JSONResponse(answer)

    async def tokenize(self, request: Request) -> Response:
        """Text to token ids."""
        size = len(await request.body())
        body = await off_loop(size, TokenizeBody.parse, await read_object(request))
        tokenizer = self._worker.tokenizer()
        encode = functools.partial(tokenizer.encode, body.text, add_special_tokens=body.add_special)
        return JSONResponse({"tokens": await off_loop(size, encode)})

    async def detokenize(self, request: Request) -> Response:
        """Token ids to text; special tokens are written out, so that it is the way back."""
        size = len(await request.body())
        body = await off_loop(size, DetokenizeBody.parse, await read_object(request))
        tokenizer = self._worker.tokenizer()
        if max(body.tokens, default=0) >= tokenizer.vocab_size:
            constraint = f"token ids below {tokenizer.vocab_size}"
            field = FieldError("tokens", constraint, f"tokens must be {constraint}.")
            raise InvalidRequest(field.message, fields=[field])
        decode = functools.partial(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return JSONResponse({"text": await off_loop(size, decode)})

    # -- helpers

    def _stream(
        self,
        source: AsyncIterator[Event],
        failure: sse.Failure,
        *,
        encoder: sse.Encoder = sse.encode,
        on_close: Callable[[], object] | None = None,
    ) -> sse.EventStream:
        return sse.EventStream(
            source,
            failure=failure,
            encoder=encoder,
            on_close=on_close,
            keep_alive=self._config.keep_alive_seconds,
            send_timeout=self._config.send_timeout_seconds,
            open_streams=self.streams,
        )

    def _serves(self) -> bool:
        return self._worker.serves

    def _reason(self) -> Mapping[str, str]:
        if not self._worker.engine_alive:
            return {"reason": "The engine's thread has died; the log says why. Restart the worker."}
        error = self._worker.load_error
        return {"reason": str(error), "code": error.code} if error else {"reason": "The load failed."}
