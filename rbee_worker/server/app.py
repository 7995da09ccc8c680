"""The ASGI application: routes, middleware, and the start and end of the worker."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from rbee_worker.config import ServerConfig
from rbee_worker.errors import MethodNotAllowed, NotFound, RbeeError
from rbee_worker.server.http.access import Access, cors, cors_origins, host_patterns
from rbee_worker.server.http.envelope import error_response
from rbee_worker.server.http.keys import ApiKeys
from rbee_worker.server.http.middleware import BodyLimit, Errors, RequestLog
from rbee_worker.server.http.operation import routes
from rbee_worker.server.http.proxies import proxy_networks
from rbee_worker.server.native.routes import AllowedModels, Native
from rbee_worker.server.observe.metrics import WorkerMetrics
from rbee_worker.server.observe.tracing import Tracing, shut_down
from rbee_worker.server.openai import OpenAI
from rbee_worker.server.openapi import Described
from rbee_worker.worker.worker import Worker

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

CLOSE_SECONDS = 10.0
"""How long it may take, at the end, to stop the engine's thread and send the last spans."""


def create_app(
    worker: Worker,
    config: ServerConfig,
    *,
    model: str | None = None,
    has_start_model: bool = True,
    keys: ApiKeys | None = None,
    tracer_provider: "TracerProvider | None" = None,
) -> Starlette:
    """Make the application that serves ``worker``. Its lifespan starts and closes the worker, but loads no model.

    ``app.state.streams`` is the set of the streams that are being sent.

    Args:
        worker: must not be started yet.
        config: keys, limits, allowed models. Its address is not used.
        model: the model given at start, which clients may load again; None: the default model.
        has_start_model: whether the worker was started with a model. If not, ``model`` is not used.
        keys: the keys of ``config``; None: they are read from there.
        tracer_provider: makes spans of requests. It is shut down at the end.

    Raises:
        InvalidRequest: a key, a key file, an origin, a host name or a proxy of ``config`` is wrong.
    """
    keys = keys if keys is not None else ApiKeys(config.api_keys, config.api_key_file)
    # Checked now, because Starlette makes the middleware only at the first request.
    cors_origins(config.cors_origins)
    host_patterns(config.trusted_hosts)
    proxies = proxy_networks(config.trusted_proxies)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                await worker.close()
                if tracer_provider is not None:
                    await shut_down(tracer_provider)

    metrics = WorkerMetrics(worker, by_client=bool(keys))
    native = Native(worker, config, AllowedModels(model, config.allow_models, has_start_model), metrics)
    openai = OpenAI(worker, config, native.streams)
    app = Starlette(
        routes=Described([*routes(native), *routes(openai)], keyed=bool(keys)).routes,
        middleware=[
            *([Middleware(ProxyHeadersMiddleware, proxies)] if proxies else ()),
            Middleware(RequestLog, metrics),
            *([Middleware(Tracing, tracer_provider)] if tracer_provider is not None else ()),
            *([Middleware(cors, config.cors_origins)] if config.cors_origins else ()),
            Middleware(Errors),
            Middleware(Access, config, keys),
            Middleware(BodyLimit, config.max_body_bytes, config.body_seconds),
        ],
        exception_handlers={HTTPException: _no_route, RbeeError: _refused},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.streams = native.streams.open
    return app


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, RbeeError):
        raise error
    return error_response(request.scope, error)


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer the router's 404 and 405. For 405, ``Allow`` names all methods that the path has."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    if isinstance(error, HTTPException) and error.status_code == MethodNotAllowed.http_status:
        refusal = MethodNotAllowed(f"{request.method[:20]} is not a method of this route.")
        return error_response(request.scope, refusal, {"Allow": ", ".join(sorted(methods))})
    return error_response(request.scope, NotFound("There is no such route."))
