"""``rbee-worker serve``."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rbee_worker import log
from rbee_worker.address import HostPort, parse_host_port
from rbee_worker.cli import options as opt
from rbee_worker.config import EngineConfig, ServerConfig

DEFAULT_ADDR = str(HostPort(opt.SERVER.host, opt.SERVER.port))

Addr = Annotated[
    str,
    typer.Option(
        "--addr",
        metavar="HOST:PORT",
        help="Address to bind; IPv6 in brackets; port 0 lets the system choose.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
NoLoad = Annotated[
    bool,
    typer.Option("--no-load", help="Serve without a model until a client asks.", rich_help_panel=opt.MODEL_PANEL),
]
AllowModel = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-model",
        metavar="MODEL",
        help="A model that clients may ask to load; repeatable.",
        rich_help_panel=opt.MODEL_PANEL,
    ),
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        help="What OpenAI's clients may call the model, beside its own name; repeatable; the first is in answers.",
        rich_help_panel=opt.MODEL_PANEL,
    ),
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="RBEE_API_KEY",
        help="A key that clients must present; repeatable; in the environment: separated by spaces.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help="A file of keys, one a line, each after a name if it has one; read again on SIGHUP.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
TrustedHost = Annotated[
    list[str] | None,
    typer.Option(
        "--trusted-host",
        metavar="NAME",
        help="A name the worker may be asked under, such as *.example.org; repeatable; others are refused.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        metavar="ORIGIN",
        help="An origin whose pages may use the worker, such as https://app.example.org; repeatable; *: all.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        metavar="FILE",
        help="A certificate chain in PEM: HTTPS instead of HTTP; read again on SIGHUP.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        "--tls-key",
        metavar="FILE",
        help="Its key in PEM, when it is not in the same file; password: RBEE_TLS_KEY_PASSWORD.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
TrustedProxy = Annotated[
    list[str] | None,
    typer.Option(
        "--trusted-proxy",
        metavar="ADDRESS",
        help="A proxy, or a network of them, whose X-Forwarded-For tells the client's address; repeatable.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
HeadTimeout = Annotated[
    float,
    typer.Option(
        "--head-timeout",
        metavar="SECONDS",
        min=0.1,
        help="How long a request's head, or a handshake of TLS, may take to arrive.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
BodyTimeout = Annotated[
    float,
    typer.Option(
        "--body-timeout",
        metavar="SECONDS",
        min=0.1,
        help="How long a request's body may take to arrive.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
IdleTimeout = Annotated[
    float,
    typer.Option(
        "--idle-timeout",
        metavar="SECONDS",
        min=1,
        help="How long a connection may stay open between two requests.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
SendTimeout = Annotated[
    float,
    typer.Option(
        "--send-timeout",
        metavar="SECONDS",
        min=0.1,
        help="How long a client may leave a stream's bytes unread.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
MaxBody = Annotated[
    int,
    typer.Option(
        "--max-body",
        metavar="SIZE",
        parser=opt.parse_size,
        help="The largest body of a request, such as 16MiB.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
MaxConnections = Annotated[
    int,
    typer.Option(
        "--max-connections",
        metavar="N",
        min=1,
        help="Connections served at a time; beyond it, only health and readiness are answered.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
AllowUnauthenticated = Annotated[
    bool,
    typer.Option(
        "--allow-unauthenticated",
        help="Bind an address that is not loopback without any key.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
MaxQueue = Annotated[
    int,
    typer.Option(
        "--max-queue",
        metavar="N",
        min=1,
        help="Requests that may wait; more are answered 429.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
MaxBatchSize = Annotated[
    int,
    typer.Option(
        "--max-batch-size",
        metavar="N",
        min=1,
        help="Requests that run in one step at most.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
PrefillChunk = Annotated[
    int,
    typer.Option(
        "--prefill-chunk",
        metavar="N",
        min=1,
        help="Prompt tokens processed in one step at most.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
NoPrefixCache = Annotated[
    bool,
    typer.Option(
        "--no-prefix-cache",
        help="Compute every prompt anew, also where it begins like an earlier one.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
KeepAlive = Annotated[
    float,
    typer.Option(
        "--keep-alive",
        metavar="SECONDS",
        min=0,
        help="Silence on a stream before a comment line; 0: never.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
ShutdownGrace = Annotated[
    float,
    typer.Option(
        "--shutdown-grace",
        metavar="SECONDS",
        min=0,
        help="How long running streams may go on after SIGTERM.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
HoldRequests = Annotated[
    bool,
    typer.Option(
        "--hold-requests",
        help="Keep requests that come during a load waiting, their streams alive, instead of answering 503.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]
ExitOnLoadError = Annotated[
    bool,
    typer.Option(
        "--exit-on-load-error",
        help="End with the load's exit code when the first load fails.",
        rich_help_panel=opt.SERVER_PANEL,
    ),
]


@opt.engine_options
def serve(
    *,
    addr: Addr = DEFAULT_ADDR,
    model: opt.ModelOption = None,
    no_load: NoLoad = False,
    allow_model: AllowModel = None,
    served_model_name: ServedModelName = None,
    engine: dict[str, Any],
    speculate: opt.Speculate = opt.ENGINE.speculate,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    allow_unauthenticated: AllowUnauthenticated = opt.SERVER.allow_unauthenticated,
    trusted_host: TrustedHost = None,
    cors_origin: CorsOrigin = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    trusted_proxy: TrustedProxy = None,
    max_connections: MaxConnections = opt.SERVER.max_connections,
    max_body: MaxBody = opt.SERVER.max_body_bytes,
    head_timeout: HeadTimeout = opt.SERVER.header_seconds,
    body_timeout: BodyTimeout = opt.SERVER.body_seconds,
    idle_timeout: IdleTimeout = opt.SERVER.idle_seconds,
    send_timeout: SendTimeout = opt.SERVER.send_timeout_seconds,
    max_queue: MaxQueue = opt.SERVER.max_queue,
    max_batch_size: MaxBatchSize = opt.ENGINE.max_batch_size,
    prefill_chunk: PrefillChunk = opt.ENGINE.prefill_chunk,
    no_prefix_cache: NoPrefixCache = not opt.ENGINE.prefix_cache,
    keep_alive: KeepAlive = opt.SERVER.keep_alive_seconds,
    shutdown_grace: ShutdownGrace = opt.SERVER.shutdown_grace_seconds,
    hold_requests: HoldRequests = opt.SERVER.hold_requests,
    exit_on_load_error: ExitOnLoadError = opt.SERVER.exit_on_load_error,
    log_level: opt.LogLevel = "info",
    log_format: opt.LogFormat = "text",
) -> int:
    """Serve loading progress and text over HTTP; binds first, then loads.

    Example: rbee-worker serve --model model.safetensors --addr 127.0.0.1:8080
    """
    log.configure(log_level, log_format, background=True)
    address = parse_host_port(addr)
    server = ServerConfig(
        host=address.host,
        port=address.port,
        api_keys=tuple(api_key or ()),
        api_key_file=api_key_file,
        allow_unauthenticated=allow_unauthenticated,
        trusted_hosts=tuple(trusted_host or ()),
        cors_origins=tuple(cors_origin or ()),
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_key_password=os.environ.get("RBEE_TLS_KEY_PASSWORD"),
        trusted_proxies=tuple(trusted_proxy or ()),
        max_connections=max_connections,
        max_body_bytes=max_body,
        header_seconds=head_timeout,
        body_seconds=body_timeout,
        idle_seconds=idle_timeout,
        send_timeout_seconds=send_timeout,
        allow_models=tuple(allow_model or ()),
        served_model_names=tuple(served_model_name or ()),
        max_queue=max_queue,
        keep_alive_seconds=keep_alive,
        shutdown_grace_seconds=shutdown_grace,
        hold_requests=hold_requests,
        exit_on_load_error=exit_on_load_error,
    )
    config = EngineConfig(
        **engine,
        max_batch_size=max_batch_size,
        prefill_chunk=prefill_chunk,
        prefix_cache=not no_prefix_cache,
        speculate=speculate,
    )
    from rbee_worker.server.run import serve as run  # noqa: PLC0415 - starlette, uvicorn

    return run(server, config, model, load=not no_load)
