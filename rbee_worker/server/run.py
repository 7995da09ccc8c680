"""The ``serve`` command: bind, serve, load, drain."""

import asyncio
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from rbee_worker.config import EngineConfig, ServerConfig
from rbee_worker.errors import Unavailable
from rbee_worker.events import LoadFailed
from rbee_worker.server.app import create_app
from rbee_worker.server.listen import BACKLOG, listen, url
from rbee_worker.server.middleware import CorrelationFilter
from rbee_worker.server.sse import EventStream
from rbee_worker.worker import Worker

FLUSH_SECONDS = 5.0
"""How long the last frames may take to reach their clients once the worker is drained."""

_OVERTIME_SECONDS = 10.0
"""Beyond the grace: what a step of the engine may still need to end the jobs that were cancelled."""

_POLL_SECONDS = 0.02

log = logging.getLogger(__name__)


def serve(server: ServerConfig, engine: EngineConfig, model: str | None, *, load: bool = True) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    The address is bound first and printed on stderr, then the load begins: its progress can be watched from the
    first moment. A signal ends the process in order (0), the second one at once (128 + its number).

    Args:
        server: the address and the limits.
        engine: how models are placed.
        model: loaded at start; None: the embedded default.
        load: False: start without a model.

    Raises:
        InvalidRequest: the address may not be bound without an API key.
        RbeeError: the address cannot be bound.
    """
    sockets = listen(server)
    sys.stderr.write(f"rbee-worker listening on {url(sockets)}\n")
    sys.stderr.flush()
    for handler in logging.getLogger().handlers:
        handler.addFilter(CorrelationFilter())
    # At debug it writes every chunk, and with it people's text.
    logging.getLogger("sse_starlette").setLevel(logging.INFO)
    worker = Worker(engine, max_queue=server.max_queue)
    app = create_app(worker, server, model=model, has_start_model=load or model is not None)
    first_load = functools.partial(worker.load, model) if load else None
    process = Server(http_config(app), worker, server, streams=app.state.streams, first_load=first_load)
    process.run(sockets=sockets)
    return process.exit_code


def http_config(app: Starlette) -> uvicorn.Config:
    """How uvicorn runs the application; the sockets are bound already."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=64 * 1024,
        timeout_keep_alive=65,  # above the minute that proxies keep their connections
        timeout_graceful_shutdown=round(FLUSH_SECONDS),
    )


class Server(uvicorn.Server):
    """uvicorn's server, ending in order: the worker is drained before the server stops.

    ``should_exit`` is set only then: sse-starlette cancels every stream as soon as it is.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        worker: Worker,
        limits: ServerConfig,
        *,
        streams: Collection[EventStream] = (),
        first_load: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._worker = worker
        self._limits = limits
        self._streams = streams
        self._first_load = first_load
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signalled = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer requests, then begin the load."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._signalled:
            self.should_exit = True
        elif self._first_load is not None:
            self._spawn(self._load(self._first_load))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """The first signal drains; the second ends the process at once.

        Signals are not noted where uvicorn would raise them again after an orderly end.
        """
        if self._signalled:
            os._exit(128 + sig)
        self._signalled = True
        if self._loop is not None and self.started:
            grace = self._limits.shutdown_grace_seconds
            self._loop.call_soon_threadsafe(lambda: self._spawn(self._drain(grace, signal.Signals(sig).name)))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, begin: Callable[[], object]) -> None:
        """The first load, and the end of the process when it fails and that was asked for."""
        begin()
        last = None
        async for event in self._worker.progress():
            last = event
        if isinstance(last, LoadFailed) and self._limits.exit_on_load_error:
            # Its thread sends the event first, then notes the error.
            await _until(lambda: not self._worker.loading)
            self.exit_code = self._worker.load_error.exit_code if self._worker.load_error else 1
            await self._drain(0.0, "--exit-on-load-error")

    async def _drain(self, grace: float, reason: str) -> None:
        """End the worker's jobs, let their last frames out, then stop."""
        log.info("shutting down (%s): waiting up to %g s for running streams", reason, grace)
        try:
            await _within(grace + _OVERTIME_SECONDS, self._worker.drain(grace))
            await _within(FLUSH_SECONDS, self._flushed())
            for stream in list(self._streams):  # the engine or a load is stuck: its clients are told all the same
                stream.finish(Unavailable("The worker is shutting down."))
            await _within(1.0, self._flushed())
        finally:
            self.should_exit = True

    async def _flushed(self) -> None:
        await _until(lambda: not self.server_state.tasks)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the state of threads and of uvicorn: nothing sets an event
        await asyncio.sleep(_POLL_SECONDS)


async def _within(seconds: float, work: Awaitable[None]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work
