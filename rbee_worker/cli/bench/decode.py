"""``rbee-worker bench decode``: how fast a model prefills and decodes, beside what memory allows."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from rbee_worker import log
from rbee_worker.cli import options as opt
from rbee_worker.cli.bench import result as results
from rbee_worker.cli.bench.result import Figure, Result
from rbee_worker.cli.failures import interrupts
from rbee_worker.cli.load import load_here
from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.errors import InferenceError, ModelUnsupported
from rbee_worker.events import Event, InferenceFailed, LoadReport, Ready

if TYPE_CHECKING:
    from rbee_worker.display import EventSink
    from rbee_worker.runtime.engine.engine import Engine
    from rbee_worker.runtime.engine.sequence import Sequence as Job
    from rbee_worker.runtime.loading.load import LoadedModel

PREFILLS = (128, 512, 2048)
CONTEXTS = (128, 512)
FIRST_TOKEN = 128
BATCHES = (1, 2, 4, 8, 16)
BATCH_PROMPT = 32
"""Tokens of each prompt where several sequences run at once."""
WARM_UP_TOKENS = 4
SEED = 0

FIGURES = {
    **{f"prefill_{count}_tok_s": Figure(f"prefill of {count} tokens", "tok/s") for count in PREFILLS},
    f"first_token_{FIRST_TOKEN}_ms": Figure(f"first token of a prompt of {FIRST_TOKEN}", "ms"),
    **{f"decode_{count}_tok_s": Figure(f"decode at a context of {count}", "tok/s") for count in CONTEXTS},
    **{f"together_{count}_tok_s": Figure(f"decode, {count} at once, together", "tok/s") for count in BATCHES},
    "read_gb_s": Figure("memory read by a plain pass", "GB/s"),
    "weights_gb_s": Figure(f"weights read while decoding at {CONTEXTS[0]}", "GB/s"),
    "weights_over_read": Figure("the same / the plain pass", ""),
}
"""Key in the JSON -> what it is, in the order of the table."""

Say = Callable[[str], object]

Runs = Annotated[
    int,
    typer.Option(
        "--runs", metavar="N", min=1, help="Rounds; each takes every figure.", rich_help_panel=opt.OUTPUT_PANEL
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        "--tokens", metavar="N", min=1, help="Tokens to decode for a figure.", rich_help_panel=opt.OUTPUT_PANEL
    ),
]


@opt.engine_options
def decode(
    ctx: typer.Context,
    argument: opt.BesideOption = None,
    *,
    model: opt.ModelOption = None,
    engine: dict[str, Any],
    runs: Runs = 3,
    tokens: Tokens = 64,
    compare: results.Compare = None,
    json: opt.Json = False,
    log_level: opt.LogLevel = "warning",
    log_format: opt.LogFormat = "text",
) -> None:
    """Measure how fast a model prefills and decodes.

    Each round takes every figure in turn: the prefill of 128, 512 and 2048 random tokens, decoding after 128 and 512 of
    them, and 1, 2, 4, 8 and 16 sequences at once. What does not fit into the context is left out, and said. The time to
    the first token is from the request to the token. No prompt is reused.

    Each round also reads memory, to tell what decoding can reach: torch adds up a gibibyte of float32 numbers with all
    its threads, or a quarter of what is free, and the fastest of three passes counts. It was written before, and is far
    larger than the caches. Beside it stands the rate of the weights: the bytes that one token has to read, times the
    tokens a second at a context of 128. Prints median (min-max) of the rounds.

    Example: rbee-worker bench decode model.safetensors --runs 5 --compare before.json
    """
    log.configure(log_level, log_format)
    model = opt.either(ctx, argument, model)
    former = results.read_former(compare, "decode") if compare is not None else None
    from rbee_worker.display import loading_sink  # noqa: PLC0415 - rich

    config = EngineConfig(**engine, max_batch_size=max(BATCHES), prefix_cache=False)
    sink = _Kept(loading_sink(json=False, quiet=json, report=False, out=opt.stdout(), err=opt.stderr()))
    with_model = load_here(model, config, sink)
    with interrupts(), _saying(quiet=json) as say:
        result = measure(with_model, sink.report, runs, tokens, say)
    results.tell(result, former, as_json=json)


def measure(engine: "Engine", report: LoadReport, runs: int, tokens: int, say: Say) -> Result:
    """Take every figure that fits, ``runs`` times.

    Args:
        engine: with a model in it and nothing to do.
        report: of the model's load.
        runs: rounds.
        tokens: to decode for a figure.
        say: is told what is being measured.

    Raises:
        ModelUnsupported: its context is too short for any figure.
        InferenceError: a step failed.
    """
    from rbee_worker.cli.bench.machine import ReadRate, torch_machine  # noqa: PLC0415 - torch

    loaded = engine.model
    assert loaded is not None  # noqa: S101 - it is ready
    room = engine.stats.kv_blocks_total * engine.stats.block_tokens
    plan = Plan.of(loaded.context_length, room, tokens)
    if not plan.prefills and not plan.batches:
        raise ModelUnsupported(
            f"A context of {loaded.context_length} tokens has no room for a prompt of {BATCH_PROMPT} and "
            f"{tokens} tokens after it.",
            hint="Give a smaller --tokens.",
        )
    weights = loaded.bytes_per_token
    memory = ReadRate(loaded.device)
    meter = Meter(engine, loaded.config.vocab_size)
    say("warming up")
    meter.alone(min(BATCH_PROMPT, loaded.context_length - WARM_UP_TOKENS), WARM_UP_TOKENS)
    rounds = []
    for number in range(runs):
        values: dict[str, float] = {}
        where = f"round {number + 1} of {runs}"
        say(f"{where}: memory")
        values["read_gb_s"] = memory.measure()
        for count in plan.prefills:
            say(f"{where}: a prompt of {count} tokens")
            first, rest = meter.alone(count, tokens if count in plan.contexts else 0)
            values[f"prefill_{count}_tok_s"] = count / first
            if count == FIRST_TOKEN:
                values[f"first_token_{count}_ms"] = first * 1000
            if count in plan.contexts:
                values[f"decode_{count}_tok_s"] = tokens / rest
        for count in plan.batches:
            say(f"{where}: {count} at once")
            values[f"together_{count}_tok_s"] = meter.together(count, tokens)
        if (rate := values.get(f"decode_{CONTEXTS[0]}_tok_s")) is not None:
            values["weights_gb_s"] = weights * rate / 1e9
            values["weights_over_read"] = values["weights_gb_s"] / values["read_gb_s"]
        rounds.append(values)
    return Result(
        bench="decode",
        machine=torch_machine(),
        model=_facts(report, loaded, weights),
        settings={"runs": runs, "tokens": tokens, "batch_prompt": BATCH_PROMPT, "device": loaded.device.type},
        figures=FIGURES,
        rounds=rounds,
        left_out=plan.left_out,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """Which figures fit: prompts to prefill, those of them to decode after, and batches; why the others do not."""

    prefills: Sequence[int]
    contexts: Sequence[int]
    batches: Sequence[int]
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, context: int, room: int, tokens: int) -> Self:
        """The plan for a context and a KV cache of so many tokens."""
        longest = min(context, room)
        holds = f"the context holds {longest} tokens"
        prefills = [count for count in PREFILLS if count < longest]
        contexts = [count for count in CONTEXTS if count + tokens < longest]
        batches = [
            count
            for count in BATCHES
            if _of_batch(count, tokens) <= longest and count * _of_batch(count, tokens) <= room
        ]
        out = {f"prefill_{count}_tok_s": holds for count in PREFILLS if count not in prefills}
        if FIRST_TOKEN not in prefills:
            out[f"first_token_{FIRST_TOKEN}_ms"] = holds
        out |= {f"decode_{count}_tok_s": holds for count in CONTEXTS if count not in contexts}
        full = f"the KV cache holds {room} tokens" if _of_batch(1, tokens) <= longest else holds
        out |= {f"together_{count}_tok_s": full for count in BATCHES if count not in batches}
        if CONTEXTS[0] not in contexts:
            out |= dict.fromkeys(("weights_gb_s", "weights_over_read"), holds)
        return cls(prefills, contexts, batches, out)


def _of_batch(count: int, tokens: int) -> int:
    """Tokens of one sequence of a batch: those that start first are ahead when the last one starts."""
    return BATCH_PROMPT + tokens + count + 1


class Meter:
    """Runs prompts of random tokens on an engine, and takes the time."""

    def __init__(self, engine: "Engine", vocabulary: int) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._random = random.Random(SEED)  # noqa: S311 - prompts, no secrets

    def alone(self, prompt: int, tokens: int) -> tuple[float, float]:
        """Run one sequence.

        Returns:
            Seconds from the request to its first token, and from there to ``tokens`` more.
        """
        began = time.perf_counter()
        job = self._submit(prompt, tokens + 1)
        while len(job.tokens) == prompt:
            self._step()
        first = time.perf_counter()
        while not job.finished:
            self._step()
        return first - began, time.perf_counter() - first

    def together(self, count: int, tokens: int) -> float:
        """Tokens a second of ``count`` sequences, counted from when all of them decode."""
        jobs = [self._submit(BATCH_PROMPT, tokens + count + 1) for _ in range(count)]
        while any(len(job.tokens) == BATCH_PROMPT for job in jobs):
            self._step()
        before = sum(len(job.tokens) for job in jobs)
        began = time.perf_counter()
        for _ in range(tokens):
            self._step()
        seconds = time.perf_counter() - began
        made = sum(len(job.tokens) for job in jobs) - before
        for job in jobs:
            self._engine.cancel(job.job_id)
        while self._engine.has_work:
            self._step()
        return made / seconds

    def _submit(self, prompt: int, tokens: int) -> "Job":
        ids = tuple(self._random.randrange(self._vocabulary) for _ in range(prompt))
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return self._engine.submit(GenerationRequest(prompt_ids=ids, sampling=sampling))

    def _step(self) -> None:
        for _, event in self._engine.step():
            if isinstance(event, InferenceFailed):
                raise InferenceError(event.message)


def _facts(report: LoadReport, loaded: "LoadedModel", weights: int) -> dict[str, Any]:
    return {
        "name": report.model,
        "architecture": report.architecture,
        "parameters": report.parameters,
        "dtype": report.dtype,
        "quantize": report.quantize,
        "kernel": report.kernel,
        "stored_as": report.stored_as,
        "runs_as": report.runs_as,
        "context_length": report.context_length,
        "weights_bytes": loaded.nbytes,
        "weights_bytes_per_token": weights,
    }


class _Kept:
    """Shows a load's events as ``shown`` does, and keeps the report."""

    report: LoadReport

    def __init__(self, shown: "EventSink") -> None:
        self._shown = shown

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.__exit__(kind, error, trace)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Ready):
            self.report = event.report
        self._shown(event)


@contextmanager
def _saying(*, quiet: bool) -> Iterator[Say]:
    """What is being measured, in one line that changes, where stderr is a terminal."""
    from rich.console import Console  # noqa: PLC0415

    console = Console(file=opt.stderr())
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield lambda _: None
        return
    with console.status("") as status:
        yield status.update
