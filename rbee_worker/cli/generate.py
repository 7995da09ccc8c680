"""``rbee-worker generate``."""

import functools
import sys
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from rbee_worker import log
from rbee_worker.cli import options as opt
from rbee_worker.cli.failures import interrupts
from rbee_worker.cli.load import load_here, show
from rbee_worker.cli.structured import Grammar, JsonSchema, Regex, read_grammar
from rbee_worker.config import MAX_STOP_SEQUENCES, RANGES, EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.errors import InferenceError, InvalidRequest
from rbee_worker.events import InferenceFailed

if TYPE_CHECKING:
    from rbee_worker.display import EventSink


_LOCAL_OPTIONS = ("model", "device", "dtype", "quantize", "max_context", "kv_cache_memory", "speculate")


def _number(option: str, help_text: str) -> typer.models.OptionInfo:
    """An option of the sampling panel; its range comes from config, which also checks it."""
    name = option.removeprefix("--").replace("-", "_")
    bounds = f" Range: {RANGES[name]}." if name in RANGES else ""
    info: typer.models.OptionInfo = typer.Option(
        option, metavar="N", help=help_text + bounds, rich_help_panel=opt.SAMPLING_PANEL
    )
    return info


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
MaxTokens = Annotated[
    int | None, _number("--max-tokens", "Tokens to make at most; without it: what is left of the context.")
]
Temperature = Annotated[float, _number("--temperature", "0 always takes the likeliest token.")]
TopP = Annotated[float, _number("--top-p", "Keep the likeliest tokens up to this probability; 1 is off.")]
TopK = Annotated[int, _number("--top-k", "Keep this many of the likeliest tokens; 0 is off.")]
MinP = Annotated[float, _number("--min-p", "Drop tokens less likely than this share of the likeliest; 0 is off.")]
RepetitionPenalty = Annotated[
    float, _number("--repetition-penalty", "Divides the logits of tokens seen before; 1 is off.")
]
PresencePenalty = Annotated[
    float, _number("--presence-penalty", "Taken from the logits of tokens made before; 0 is off.")
]
FrequencyPenalty = Annotated[
    float, _number("--frequency-penalty", "Taken once for each time a token was made; 0 is off.")
]
Seed = Annotated[int | None, _number("--seed", "64 bits; the same seed gives the same text. Without it: random.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help=f"Stop before this text; may be given up to {MAX_STOP_SEQUENCES} times.",
        rich_help_panel=opt.SAMPLING_PANEL,
    ),
]


def generate(
    ctx: typer.Context,
    *,
    prompt: Prompt,
    system: System = None,
    raw: Raw = False,
    max_tokens: MaxTokens = opt.SAMPLING.max_tokens,
    temperature: Temperature = opt.SAMPLING.temperature,
    top_p: TopP = opt.SAMPLING.top_p,
    top_k: TopK = opt.SAMPLING.top_k,
    min_p: MinP = opt.SAMPLING.min_p,
    repetition_penalty: RepetitionPenalty = opt.SAMPLING.repetition_penalty,
    presence_penalty: PresencePenalty = opt.SAMPLING.presence_penalty,
    frequency_penalty: FrequencyPenalty = opt.SAMPLING.frequency_penalty,
    seed: Seed = opt.SAMPLING.seed,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    model: opt.ModelOption = None,
    device: opt.Device = opt.ENGINE.device,
    dtype: opt.DType = opt.ENGINE.dtype,
    quantize: opt.Quantize = opt.ENGINE.quantize,
    max_context: opt.MaxContext = opt.ENGINE.max_context,
    kv_cache_memory: opt.KVCacheMemory = opt.ENGINE.kv_cache_memory,
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
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        grammar=read_grammar(json_schema, regex, grammar),
    )
    if raw and system is not None:
        raise InvalidRequest("--system: no effect with --raw, which uses no chat template.", hint="Leave out one.")
    request = GenerationRequest.from_text(read_prompt(prompt), system=system, raw=raw, sampling=sampling)
    if addr is None:
        config = EngineConfig(
            device=device,
            dtype=dtype,
            quantize=quantize,
            max_context=max_context,
            max_batch_size=1,
            kv_cache_memory=kv_cache_memory,
            speculate=speculate,
        )
        _generate_here(request, model, config, json=json, quiet=quiet)
    else:
        opt.refuse_with_addr(ctx, *_LOCAL_OPTIONS)
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
    with interrupts(functools.partial(engine.cancel, job_id)) as received:
        with _printer(out, json=json, quiet=quiet) as printer:
            last = show(events, printer)
        received.check()
    if isinstance(last, InferenceFailed):
        raise InferenceError(last.message)


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
    """The prompt as given, or from stdin for ``-``: there one newline at the end is the shell's and taken off.

    Raises:
        InvalidRequest: it is empty, or stdin is not UTF-8.
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
    """False for what Python makes of bytes on the command line that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
