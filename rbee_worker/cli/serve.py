"""``rbee-worker serve``."""

from pathlib import Path
from typing import Annotated

import typer

from rbee_worker import log
from rbee_worker.address import HostPort, parse_host_port
from rbee_worker.cli import options as opt
from rbee_worker.config import EngineConfig, ServerConfig
from rbee_worker.errors import InvalidRequest

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
        "--api-key-file", metavar="FILE", help="A file of keys, one a line.", rich_help_panel=opt.SERVER_PANEL
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


def serve(
    *,
    addr: Addr = DEFAULT_ADDR,
    model: opt.ModelOption = None,
    no_load: NoLoad = False,
    allow_model: AllowModel = None,
    device: opt.Device = opt.ENGINE.device,
    dtype: opt.DType = opt.ENGINE.dtype,
    quantize: opt.Quantize = opt.ENGINE.quantize,
    max_context: opt.MaxContext = opt.ENGINE.max_context,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    allow_unauthenticated: AllowUnauthenticated = opt.SERVER.allow_unauthenticated,
    max_queue: MaxQueue = opt.SERVER.max_queue,
    max_batch_size: MaxBatchSize = opt.ENGINE.max_batch_size,
    prefill_chunk: PrefillChunk = opt.ENGINE.prefill_chunk,
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
    log.configure(log_level, log_format)
    address = parse_host_port(addr)
    keys = [*(api_key or ()), *(read_keys(api_key_file) if api_key_file is not None else ())]
    if not all(key.strip() for key in keys):
        raise InvalidRequest("--api-key: a key is empty.", hint="Without a key, leave the option out.")
    server = ServerConfig(
        host=address.host,
        port=address.port,
        api_keys=tuple(keys),
        allow_unauthenticated=allow_unauthenticated,
        allow_models=tuple(allow_model or ()),
        max_queue=max_queue,
        keep_alive_seconds=keep_alive,
        shutdown_grace_seconds=shutdown_grace,
        hold_requests=hold_requests,
        exit_on_load_error=exit_on_load_error,
    )
    engine = EngineConfig(
        device=device,
        dtype=dtype,
        quantize=quantize,
        max_context=max_context,
        max_batch_size=max_batch_size,
        prefill_chunk=prefill_chunk,
    )
    from rbee_worker.server.run import serve as run  # noqa: PLC0415 - starlette, uvicorn

    return run(server, engine, model, load=not no_load)


def read_keys(path: Path) -> list[str]:
    """The keys of a file: one a line; empty lines and lines that begin with ``#`` are passed over.

    Raises:
        InvalidRequest: it cannot be read, or holds no key.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--api-key-file {path}: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise InvalidRequest(f"--api-key-file {path}: the file holds no key.", hint="Write one key a line.")
    return keys
