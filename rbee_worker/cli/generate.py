"""``rbee-worker generate``."""

import functools
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from rbee_worker import log
from rbee_worker.cli import options as opt
from rbee_worker.cli.failures import Interrupts, interrupts
from rbee_worker.cli.load import load_here, show
from rbee_worker.cli.sampling import sampling_options
from rbee_worker.cli.structured import Grammar, JsonSchema, Regex, read_grammar
from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.errors import InferenceError, InvalidRequest
from rbee_worker.events import InferenceEvent, InferenceFailed

if TYPE_CHECKING:
    from rbee_worker.display import EventSink


Prompt = Annotated[
    str,
    typer.Option(
        "--prompt", "-p", metavar="TEXT", help="The prompt; - reads it from stdin, less one newline at its end."
    ),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="A system message for the model's chat template.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]


@sampling_options
@opt.engine_options
def generate(
    ctx: typer.Context,
    *,
    prompt: Prompt,
    system: System = None,
    raw: Raw = False,
    sampling: dict[str, Any],
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    model: opt.ModelOption = None,
    engine: dict[str, Any],
    speculate: opt.Speculate = opt.ENGINE.speculate,
    addr: opt.RemoteAddr = None,
    api_key: opt.RemoteKey = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    log_level: opt.LogLevel = "warning",
    log_format: opt.LogFormat = "text",
) -> None:
    """Generate text and write it to stdout as it is made.

    Example: rbee-worker generate --prompt "Why is the sky blue?" --max-tokens 100
    """
    log.configure(log_level, log_format)
    params = SamplingParams(**sampling, grammar=read_grammar(json_schema, regex, grammar))
    if raw and system is not None:
        raise InvalidRequest("--system: no effect with --raw, which uses no chat template.", hint="Leave out one.")
    request = GenerationRequest.from_text(read_prompt(prompt), system=system, raw=raw, sampling=params)
    if addr is None:
        config = EngineConfig(**engine, max_batch_size=1, speculate=speculate)
        _generate_here(request, model, config, json=json, quiet=quiet)
    else:
        opt.refuse_with_addr(ctx, "model", *engine, "speculate")
        _generate_there(request, addr, api_key, json=json, quiet=quiet)


def _generate_here(
    request: GenerationRequest, model: str | None, config: EngineConfig, *, json: bool, quiet: bool
) -> None:
    from rbee_worker.display import loading_sink  # noqa: PLC0415 - rich

    out = opt.stdout()
    engine = load_here(model, config, loading_sink(json=json, quiet=quiet, report=False, out=out, err=opt.stderr()))
    job_id = str(uuid.uuid4())
    events = engine.generate(replace(request, job_id=job_id))
    # A signal ends the job with its `end` event, after the text so far.
    cancel = functools.partial(engine.cancel, job_id)
    with interrupts(cancel) as received:
        with _printer(out, json=json, quiet=quiet) as printer:
            last = show(cancelled_by(received, events, cancel), printer)
        received.check()
    if isinstance(last, InferenceFailed):
        raise InferenceError(last.message)


def cancelled_by(
    received: Interrupts, events: Iterable[InferenceEvent], cancel: Callable[[], None]
) -> Iterator[InferenceEvent]:
    """The events of a job. A signal that came before the engine knew of the job cancels it at its first event."""
    for event in events:
        if received.came:
            cancel()
        yield event


def _generate_there(request: GenerationRequest, addr: str, api_key: str | None, *, json: bool, quiet: bool) -> None:
    from rbee_worker.client import WorkerClient  # noqa: PLC0415 - httpx

    with (
        WorkerClient(addr, api_key) as client,
        interrupts(),
        _printer(opt.stdout(), json=json, quiet=quiet) as printer,
    ):
        show(client.generate(request), printer)


def _printer(out: TextIO, *, json: bool, quiet: bool) -> "EventSink":
    from rbee_worker.display import JsonLines, TokenPrinter  # noqa: PLC0415 - rich

    return JsonLines(out) if json else TokenPrinter(out, None if quiet else opt.stderr())


def read_prompt(text: str) -> str:
    """The prompt: ``text``, or for ``-`` what stdin holds, without one newline at its end, which shells add.

    Raises:
        InvalidRequest: the prompt is empty or not UTF-8.
    """
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"--prompt -: stdin is not UTF-8 at byte {error.start}.") from None
        text = text.removesuffix("\n").removesuffix("\r")
    if not _is_unicode(text):
        raise InvalidRequest("--prompt: the text is not UTF-8.", hint="Check the terminal's encoding.")
    if not text:
        raise InvalidRequest("--prompt: the prompt is empty.", hint="Give at least one character.")
    return text


def _is_unicode(text: str) -> bool:
    """Whether it is valid Unicode. Python turns bytes of the command line that are not UTF-8 into other text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
