"""WorkerClient: what the command line uses with ``--addr``. It turns a worker's streams into events."""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import quote
from uuid import uuid4

import httpx
from httpx_sse import EventSource, SSEError

from rbee_worker.address import DIRECT, parse_base_url
from rbee_worker.config import AS_CONFIGURED, GenerationRequest, GrammarKind, LoadSettings
from rbee_worker.errors import WorkerUnreachable, error_of
from rbee_worker.events import Event, InferenceEvent, InferenceFailed, LoadFailed, LoadingEvent
from rbee_worker.wire import DONE, event_in, refusal_in

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 90.0
"""How long a stream may be silent. A worker sends at least a comment every ``--keep-alive`` (10) seconds."""
CANCEL_SECONDS = 5.0

PROGRESS = "/v1/loading/progress"
_RUNNING = "Is `rbee-worker serve` running there?"


class WorkerClient:
    """Sends requests to one worker. A context manager. Not thread-safe.

    Every method but :meth:`cancel` raises :class:`WorkerUnreachable` when no worker answers at the address, and else
    the error that the worker names.
    """

    def __init__(self, addr: str, api_key: str | None = None, *, silence_seconds: float = SILENCE_SECONDS) -> None:
        """Make a client; nothing is sent yet.

        Args:
            addr: ``HOST:PORT`` or a URL.
            api_key: sent with every request; None: no key.
            silence_seconds: how long the worker may be silent.

        Raises:
            InvalidRequest: ``addr`` is neither.
        """
        self.base_url = parse_base_url(addr)
        self._silence = silence_seconds
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(silence_seconds, connect=CONNECT_SECONDS)
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout, mounts=DIRECT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def load(
        self,
        model: str | None,
        settings: LoadSettings = AS_CONFIGURED,
    ) -> Iterator[LoadingEvent]:
        """Start a load, then iterate its events. The request is sent by the call, not by the first iteration.

        For what is None the worker uses its own: the model that it was started with, and its settings.

        Raises:
            Conflict: another load is running.
            Forbidden: the worker's ``--allow-model`` does not allow this model.
            ModelError: the model cannot be loaded. The iterator may raise it too, after the ``error`` event.
        """
        body = settings.given if model is None else {"model": model, **settings.given}
        with self._reaching():
            response = self._http.post("/v1/loading", json=body)
        if not response.is_success:
            self._refused(response)
        return self.progress()

    def progress(self) -> Iterator[LoadingEvent]:
        """The events of the current load: first its latest state, then all that follow, up to the terminal event.

        Raises:
            RbeeError: the load failed. It is raised after the ``error`` event.
        """
        with closing(self._stream("GET", PROGRESS)) as events:
            for event in events:
                if not isinstance(event, LoadingEvent):
                    raise self._unintelligible(f"a {type(event).__name__} event among the loading events")
                yield event
                if isinstance(event, LoadFailed):
                    raise error_of(event.code, event.message)

    def cancel_load(self) -> bool:
        """Cancel the running load. Returns False if no load is running."""
        with self._reaching():
            response = self._http.delete("/v1/loading", timeout=CANCEL_SECONDS)
        if response.status_code == httpx.codes.NOT_FOUND:
            return False
        if not response.is_success:
            self._refused(response)
        return True

    def history(self) -> list[Mapping[str, Any]]:
        """What the worker's last loads came to, newest first: the objects of ``GET /v1/loading/history``."""
        with self._reaching():
            response = self._http.get("/v1/loading/history")
        if not response.is_success:
            self._refused(response)
        try:
            return [dict(load) for load in response.json()["loads"]]
        except (ValueError, TypeError, LookupError, RecursionError):
            raise self._unintelligible("no history of loads") from None

    def generate(self, request: GenerationRequest) -> Iterator[InferenceEvent]:
        """The events of one job. Closing the iterator, or an interrupt inside it, cancels the job at the worker.

        Raises:
            RbeeError: the worker refused the request, before any event; or the job failed, after the ``error`` event.
        """
        job_id = request.job_id or str(uuid4())
        terminal = False
        with closing(self._stream("POST", "/v1/inference", inference_body(request, job_id))) as events:
            try:
                for event in events:
                    if not isinstance(event, InferenceEvent):
                        raise self._unintelligible(f"a {type(event).__name__} event among the inference events")
                    terminal = event.terminal
                    yield event
                    if isinstance(event, InferenceFailed):
                        raise error_of(event.code, event.message)
            except (GeneratorExit, KeyboardInterrupt):
                if not terminal:
                    self.cancel(job_id)
                raise

    def cancel(self, job_id: str) -> None:
        """Try to cancel a job. Failures are ignored, because closing the connection cancels the job too."""
        with suppress(httpx.HTTPError):
            self._http.delete(f"/v1/inference/{quote(job_id, safe='')}", timeout=CANCEL_SECONDS)

    def _stream(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Generator[Event, None, None]:
        """The events of one SSE stream, up to ``[DONE]``."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        terminal = False
        with self._reaching(), self._http.stream(method, path, json=body, headers=headers) as response:
            if not response.is_success:
                response.read()
                self._refused(response)
            for frame in EventSource(response).iter_sse():
                if frame.data == DONE:
                    return
                event = self._event(frame.data)
                terminal = terminal or event.terminal
                yield event
        ending = "after the last event, before [DONE]" if terminal else "before the last event"
        raise WorkerUnreachable(
            f"The stream from {self.base_url}{path} was cut {ending}.", hint="The worker may have been stopped."
        )

    def _event(self, data: str) -> Event:
        try:
            return event_in(data)
        except ValueError as error:
            raise self._unintelligible(str(error)) from None

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn failures of the connection into :class:`WorkerUnreachable`."""
        try:
            yield
        except httpx.ConnectTimeout:
            self._unreachable(f"did not answer within {CONNECT_SECONDS:g} s")
        except httpx.ReadTimeout:
            self._unreachable(f"sent nothing for {self._silence:g} s")
        except httpx.ConnectError as error:
            distrusted = "CERTIFICATE_VERIFY_FAILED" in str(error)
            hint = "SSL_CERT_FILE names a certificate, or an authority, of your own." if distrusted else _RUNNING
            self._unreachable(f"cannot be connected to ({error})", hint)
        except httpx.RemoteProtocolError as error:
            self._unreachable(f"broke off or speaks no HTTP ({error})", f"{_RUNNING} With --tls-cert: https://.")
        except (SSEError, httpx.InvalidURL) as error:
            self._unreachable(f"does not answer as a worker does ({error})")
        except httpx.HTTPError as error:
            self._unreachable(f"was lost ({type(error).__name__}: {error})")

    def _unreachable(self, what: str, hint: str = _RUNNING) -> NoReturn:
        raise WorkerUnreachable(f"The worker at {self.base_url} {what}.", hint=hint) from None

    def _unintelligible(self, what: str) -> WorkerUnreachable:
        hint = "Worker and client may be of different versions."
        return WorkerUnreachable(f"The worker at {self.base_url} sent {what}.", hint=hint)

    def _refused(self, response: httpx.Response) -> NoReturn:
        """Raise the error in a response with an error status."""
        status = response.status_code
        found = _error_in(response)
        if found is None:
            raise WorkerUnreachable(
                f"{response.url} answered {status}, which is not a worker's error.",
                hint="Does another program listen there?",
            )
        code, message, hint = found
        if status == httpx.codes.UNAUTHORIZED:
            hint = "Give the worker's key with --api-key or in RBEE_API_KEY."
        after = response.headers.get("Retry-After", "")
        raise error_of(code, message, status=status, hint=hint, retry_after=int(after) if after.isdigit() else None)


def inference_body(request: GenerationRequest, job_id: str) -> dict[str, Any]:
    """The body of ``POST /v1/inference``: only what differs from the defaults.

    A prompt that is not ``raw`` is sent as one user message, so that the worker applies the model's chat template.
    """
    body: dict[str, Any] = {"job_id": job_id}
    if request.messages is not None:
        body["messages"] = [dict(message) for message in request.messages]
    elif request.raw:
        body["prompt"] = request.prompt
    else:
        body["messages"] = [{"role": "user", "content": request.prompt}]
    sampling = asdict(request.sampling)
    defaults = asdict(type(request.sampling)())
    body.update((name, value) for name, value in sampling.items() if value != defaults[name])
    if request.sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in request.sampling.logit_bias}
    if request.prompt_progress:
        body["prompt_progress"] = True
    if request.timeout_seconds is not None:
        body["timeout"] = request.timeout_seconds
    if (grammar := body.pop("grammar", None)) is not None:
        body.update(_grammar_field(grammar["kind"], grammar["text"]))
    return body


def _grammar_field(kind: GrammarKind, text: str) -> dict[str, Any]:
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind == "json_schema":
        return {"json_schema": json.loads(text)}
    return {"regex" if kind == "regex" else "grammar": text}


def _error_in(response: httpx.Response) -> tuple[str, str, str | None] | None:
    """The code, message and hint in the body of an error: an SSE stream or JSON. None: the body is not a worker's."""
    try:
        if response.headers.get("Content-Type", "").startswith("text/event-stream"):
            event = event_in(next(iter(EventSource(response).iter_sse())).data)
            return (event.code, event.message, None) if isinstance(event, InferenceFailed | LoadFailed) else None
        answer = response.json()
        return refusal_in(answer) if isinstance(answer, dict) else None
    except (ValueError, RecursionError, StopIteration):
        return None
