"""``rbee-worker load``. ``generate`` uses its functions too."""

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import typer

from rbee_worker import log
from rbee_worker.cancellation import Cancellation
from rbee_worker.cli import options as opt
from rbee_worker.cli.failures import Interrupted, interrupts
from rbee_worker.config import EngineConfig, LoadSettings
from rbee_worker.errors import Cancelled
from rbee_worker.events import Event, LoadCancelled, LoadingEvent

if TYPE_CHECKING:
    from rbee_worker.client import WorkerClient
    from rbee_worker.display import EventSink
    from rbee_worker.runtime.engine.engine import Engine


@opt.engine_options
def load(
    ctx: typer.Context,
    model: opt.ModelArgument = None,
    *,
    engine: dict[str, Any],
    addr: opt.RemoteAddr = None,
    api_key: opt.RemoteKey = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    log_level: opt.LogLevel = "warning",
    log_format: opt.LogFormat = "text",
) -> None:
    """Load a model, draw the progress, print a report and exit.

    With --addr a running worker loads it, and its progress is drawn; Ctrl-C cancels that load.

    Example: rbee-worker load model.safetensors
    """
    log.configure(log_level, log_format)
    from rbee_worker.display import loading_sink  # noqa: PLC0415 - rich

    sink = loading_sink(json=json, quiet=quiet, report=True, out=opt.stdout(), err=opt.stderr())
    if addr is None:
        load_here(model, EngineConfig(**engine), sink)
        return
    shared = [field.name for field in fields(LoadSettings)]
    opt.refuse_with_addr(ctx, *(name for name in engine if name not in shared))
    from rbee_worker.client import WorkerClient  # noqa: PLC0415 - httpx

    with WorkerClient(addr, api_key) as client:
        # Where an option is not given here, the worker's own option applies.
        said = LoadSettings(**{name: engine[name] for name in opt.given(ctx, *shared)})
        load_there(client, model, sink, said)


def load_here(model: str | None, config: EngineConfig, sink: "EventSink") -> "Engine":
    """Load in this process, and show the events with ``sink``. Returns an engine with the model.

    Raises:
        Interrupted: a signal came. The load was cancelled and its memory freed.
        RbeeError: the load failed.
    """
    cancel = Cancellation()
    with interrupts(cancel.set) as received:
        with sink:
            from rbee_worker.runtime.engine.engine import Engine  # noqa: PLC0415 - torch, seconds of it

            engine = Engine(config)
            last = show(engine.load(model, cancel), sink)
        received.check()
    if isinstance(last, LoadCancelled):
        raise Cancelled("The load was cancelled.")
    return engine


def load_there(
    client: "WorkerClient",
    model: str | None,
    sink: "EventSink",
    settings: LoadSettings,
) -> None:
    """Let a worker load a model, and show the events with ``sink``.

    A signal cancels the load at the worker, and the rest of its events is shown.

    Args:
        client: of the worker.
        model: None: the model that the worker was started with.
        sink: shows the events.
        settings: of this load.

    Raises:
        Interrupted: a signal came.
        Cancelled: someone else cancelled the load.
        RbeeError: the load failed, or the worker refused it.
    """
    last: Event | None = None

    def unseen(events: Iterable[LoadingEvent]) -> Iterable[LoadingEvent]:
        # A second subscription begins with the latest event, which may have been shown before.
        nonlocal last
        for event in events:
            if not isinstance(last, LoadingEvent) or event.seq > last.seq:
                last = event
                yield event

    with interrupts(), sink:
        events = client.load(model, settings)
        try:
            show(unseen(events), sink)
        except Interrupted:
            if client.cancel_load():
                show(unseen(client.progress()), sink)
            raise
    if isinstance(last, LoadCancelled):
        raise Cancelled("The load was cancelled at the worker.")


def show(events: Iterable[Event], sink: "EventSink") -> Event | None:
    """Give every event to ``sink``, and return the last one. The iterator is always closed."""
    last = None
    try:
        for event in events:
            last = event
            sink(event)
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()
    return last
