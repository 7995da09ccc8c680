"""The ``serve`` command: bind, serve, load, drain."""

import asyncio
import contextvars
import functools
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from types import FrameType
from typing import cast

import uvicorn
from starlette.applications import Starlette

from rbee_worker.config import EngineConfig, ServerConfig
from rbee_worker.errors import RbeeError, Unavailable
from rbee_worker.events import LoadFailed
from rbee_worker.log import say
from rbee_worker.server.app import create_app
from rbee_worker.server.http.accept import Acceptor
from rbee_worker.server.http.access import MAX_HEAD_BYTES
from rbee_worker.server.http.keys import ApiKeys
from rbee_worker.server.http.listen import listen, url
from rbee_worker.server.http.middleware import CorrelationFilter
from rbee_worker.server.http.protocol import (
    OTHER_FILES,
    SPARE_CONNECTIONS,
    ConnectionLimits,
    LimitedProtocol,
    limited,
)
from rbee_worker.server.http.tls import Certificate, certificate
from rbee_worker.server.observe.tracing import provider_from_environment
from rbee_worker.server.sse import EventStream
from rbee_worker.worker.worker import Worker

FLUSH_SECONDS = 5.0
"""How long the last frames may take to reach their clients once the worker is drained."""

_OVERTIME_SECONDS = 10.0
"""Beyond the grace: what a step of the engine may still need to end the jobs that were cancelled."""


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
        InvalidRequest: the address may not be bound without an API key, or a key file, a certificate, an origin or a
            host name is wrong.
        RbeeError: the address cannot be bound.
    """
    keys = ApiKeys(server.api_keys, server.api_key_file)
    cert = certificate(server)
    worker = Worker(engine, max_queue=server.max_queue)
    app = create_app(
        worker,
        server,
        model=model,
        has_start_model=load or model is not None,
        keys=keys,
        tracer_provider=provider_from_environment(),
    )
    sockets = listen(server)
    say(f"rbee-worker listening on {url(sockets, 'https' if cert else 'http')}", __name__)
    logging.captureWarnings(capture=True)  # they too would wait for whoever reads stderr
    for handler in logging.getLogger().handlers:
        handler.addFilter(CorrelationFilter())
    # At debug it writes every chunk, and with it people's text.
    logging.getLogger("sse_starlette").setLevel(logging.INFO)
    limits = ConnectionLimits(server.max_connections, server.header_seconds)
    limits = limits.within(allow_open_files(server.max_connections + SPARE_CONNECTIONS + OTHER_FILES))
    process = Server(
        http_config(app, server, limits, cert),
        worker,
        server,
        streams=app.state.streams,
        first_load=functools.partial(worker.loads.begin, model) if load else None,
        reloads={
            **({"API keys": keys.reload} if keys.file else {}),
            **({"certificate": cert.reload} if cert else {}),
        },
    )
    process.run(sockets=sockets)
    return process.exit_code


def http_config(
    app: Starlette, server: ServerConfig, limits: ConnectionLimits, cert: Certificate | None = None
) -> uvicorn.Config:
    """How uvicorn runs the application; the sockets are bound already."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=limited(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=math.ceil(server.idle_seconds),
        timeout_graceful_shutdown=round(FLUSH_SECONDS),
        ssl_context_factory=(lambda *_: cert.context) if cert is not None else None,
    )


def allow_open_files(count: int) -> int:
    """Raise the limit on open files towards ``count``, as far as the system lets it, and say when it does not.

    Returns:
        How many may be open: no more than ``count``.
    """
    if sys.platform == "win32":
        return count
    import resource  # noqa: PLC0415 - not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
        with suppress(OSError, ValueError):  # macOS has a limit of its own beside the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit < count:
            log.warning("the system allows %d open files; --max-connections would need %d", limit, count)
            return limit
    return count


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
        reloads: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        super().__init__(config)
        self._reloads = reloads or {}
        self.exit_code = 0
        self._worker = worker
        self._limits = limits
        self._streams = streams
        self._first_load = first_load
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signalled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._acceptor: Acceptor | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer requests, then begin the load."""
        self._loop = asyncio.get_running_loop()
        # Without anything to read again, a terminal that hangs up ends the process, as is usual.
        if self._reloads and threading.current_thread() is threading.main_thread():
            self._loop.add_signal_handler(signal.SIGHUP, self.reload)
        await super().startup([])
        self._acceptor = self._accept(sockets or [])
        if self._signalled:
            self.should_exit = True
        elif self._first_load is not None:
            self._spawn(self._load(self._first_load))

    def _accept(self, sockets: list[socket.socket]) -> Acceptor:
        """Begin to accept connections, instead of uvicorn."""
        protocol = cast("type[LimitedProtocol]", self.config.http_protocol_class)
        make = functools.partial(protocol, self.config, self.server_state, self.lifespan.state)
        connections = cast("set[LimitedProtocol]", self.server_state.connections)
        acceptor = Acceptor(make, connections, protocol.limits, self.config.ssl)
        acceptor.start(sockets)
        return acceptor

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and end what there is."""
        if self._acceptor is not None:
            await self._acceptor.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """The first signal drains; the second ends the process at once.

        Signals are not noted where uvicorn would raise them again after an orderly end.
        """
        if self._signalled:
            os._exit(128 + sig)
        self._signalled = True
        if self._loop is not None and self.started:
            grace = self._limits.shutdown_grace_seconds
            self._loop.call_soon_threadsafe(
                lambda: self._spawn(self._drain(grace, signal.Signals(sig).name)),
                context=contextvars.Context(),  # not of the request that the signal interrupted
            )

    def reload(self) -> None:
        """Read keys and certificates again; what is wrong with them is logged, and the old ones stay."""
        for what, read in self._reloads.items():
            try:
                read()
            except (RbeeError, OSError) as error:
                log.error("SIGHUP: %s What was there before stays.", error)  # noqa: TRY400 - the message says it all
            else:
                log.info("SIGHUP: %s read again", what)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, begin: Callable[[], object]) -> None:
        """The first load, and the end of the process when it cannot begin, or fails and that was asked for."""
        try:
            begin()
        except Exception as error:
            if not self._signalled:
                unexpected = not isinstance(error, RbeeError)
                log.error("the first load cannot begin: %s", error, exc_info=unexpected)  # noqa: TRY400
                await self._give_up(error, "the first load cannot begin")
            return
        last = None
        async for event in self._worker.loads.progress():
            last = event
        if isinstance(last, LoadFailed) and self._limits.exit_on_load_error:
            await self._give_up(self._worker.loads.error, "--exit-on-load-error")

    async def _give_up(self, error: Exception | None, reason: str) -> None:
        """End the process with the exit code of ``error``."""
        self.exit_code = error.exit_code if isinstance(error, RbeeError) else RbeeError.exit_code
        await self._drain(0.0, reason)

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
        while tasks := self.server_state.tasks:
            await asyncio.wait(set(tasks))


async def _within(seconds: float, work: Awaitable[None]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work
