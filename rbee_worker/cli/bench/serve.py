"""``rbee-worker bench serve``: how a running worker answers requests that arrive whether or not it keeps up."""

import math
import queue
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Self

import typer

from rbee_worker import log
from rbee_worker.cli import options as opt
from rbee_worker.cli.bench import result as results
from rbee_worker.cli.bench.machine import machine
from rbee_worker.cli.bench.result import Figure, Result
from rbee_worker.cli.failures import interrupts
from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.errors import InferenceError, RbeeError
from rbee_worker.events import End, Started, Token

if TYPE_CHECKING:
    from rbee_worker.client import WorkerClient

SHORTEST = 4
"""Words of the shortest prompt."""
PERCENTILES = (50, 90, 99)
TIMES = {
    "first_token": "first token",
    "between_tokens": "between two tokens",
    "end_to_end": "request to end",
}
FIGURES = {
    f"{name}_p{percent}_ms": Figure(f"{label}, p{percent}", "ms")
    for name, label in TIMES.items()
    for percent in PERCENTILES
} | {
    "sent_late_p99_ms": Figure("sent after it was due, p99", "ms"),
    "output_tok_s": Figure("tokens made", "tok/s"),
    "prompt_tok_s": Figure("tokens of prompts", "tok/s"),
    "requests_per_s": Figure("requests answered", "1/s"),
    "failed": Figure("requests failed", ""),
}
"""Key in the JSON -> what it is, in the order of the table."""

WORDS = (
    "the of and a to in it is was that for on with as at by from sea ship wind light stone river house field winter "
    "garden letter morning evening window road hill bread water fire night old new long small bright quiet"
)

LOAD_PANEL = "Requests"

Addr = Annotated[
    str,
    typer.Option(
        "--addr",
        metavar="HOST:PORT",
        help="The running worker: an address or an http(s):// URL.",
        rich_help_panel=opt.REMOTE_PANEL,
    ),
]
Rate = Annotated[
    float,
    typer.Option(
        "--rate",
        metavar="R",
        min=0.001,
        help="Requests a second, on average; the times between them are random (a Poisson process).",
        rich_help_panel=LOAD_PANEL,
    ),
]
Requests = Annotated[
    int, typer.Option("--requests", metavar="N", min=1, help="Requests of a round.", rich_help_panel=LOAD_PANEL)
]
PromptWords = Annotated[
    int,
    typer.Option(
        "--prompt-words",
        metavar="N",
        min=SHORTEST,
        help=f"Words of the longest prompt; the lengths are spread from {SHORTEST} to it, short ones being more.",
        rich_help_panel=LOAD_PANEL,
    ),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens of each answer.", rich_help_panel=LOAD_PANEL)
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", help="The same seed gives the same arrivals and lengths.", rich_help_panel=LOAD_PANEL
    ),
]
Runs = Annotated[int, typer.Option("--runs", metavar="N", min=1, help="Rounds.", rich_help_panel=opt.OUTPUT_PANEL)]


def serve(
    *,
    addr: Addr,
    api_key: opt.RemoteKey = None,
    rate: Rate = 2.0,
    requests: Requests = 50,
    prompt_words: PromptWords = 256,
    max_tokens: MaxTokens = 64,
    seed: Seed = 0,
    runs: Runs = 1,
    compare: results.Compare = None,
    json: opt.Json = False,
    log_level: opt.LogLevel = "warning",
    log_format: opt.LogFormat = "text",
) -> None:
    """Measure how a running worker answers under load.

    Requests arrive at random times, whether or not the worker keeps up, as those of many users do. Each has a prompt of
    another length and is streamed. A time begins when its request was due, so that a wait counts. The percentiles are
    of all requests of a round that were answered; those that failed are counted by their code. One request goes before,
    uncounted. Prompts differ in every round, so none is reused.

    Example: rbee-worker bench serve --addr 127.0.0.1:8080 --rate 4 --requests 100
    """
    log.configure(log_level, log_format)
    former = results.read_former(compare, "serve") if compare is not None else None
    load = Load(rate, requests, prompt_words, max_tokens, seed)
    with interrupts():
        result = measure(addr, api_key, load, runs)
    results.tell(result, former, as_json=json)
    failed = result.also["failures"]
    if sum(failed.values()) == runs * requests:
        raise InferenceError(f"No request was answered: {', '.join(failed)}.", hint="Ask for less, or see its log.")


@dataclass(frozen=True, slots=True)
class Load:
    """What the worker is asked: requests a second, how many, the longest prompt, the tokens of an answer, the seed."""

    rate: float
    requests: int
    prompt_words: int
    max_tokens: int
    seed: int

    def arrivals(self, number: int) -> Iterator[tuple[float, int]]:
        """Of one round: when each request is due, in seconds, and the words of its prompt."""
        chance = random.Random(f"{self.seed} {number}")  # noqa: S311 - no secrets
        due = 0.0
        for _ in range(self.requests):
            due += chance.expovariate(self.rate)
            # As many from 4 to 8 words as from 8 to 16: real prompts are mostly short, and some are long.
            words = SHORTEST * (self.prompt_words / SHORTEST) ** chance.random()
            yield due, round(words)

    def request(self, words: int) -> GenerationRequest:
        """A request with a prompt that nobody sent before."""
        chance, known = random.Random(), WORDS.split()  # noqa: S311
        prompt = " ".join([uuid.uuid4().hex[:8], *(chance.choice(known) for _ in range(words - 1))])
        sampling = SamplingParams(temperature=0, max_tokens=self.max_tokens, ignore_eos=True)
        return GenerationRequest(prompt=prompt, raw=True, sampling=sampling)


@dataclass(slots=True)
class Answer:
    """How one request went: when it was due, was sent, got its tokens and ended, on the monotonic clock; its counts."""

    due: float
    sent: float = 0.0
    tokens: list[float] = field(default_factory=list)
    end: float = 0.0
    made: int = 0
    prompt: int = 0
    failure: str = ""


def measure(addr: str, api_key: str | None, load: Load, runs: int) -> Result:
    """Send every request of every round.

    Raises:
        RbeeError: the request that goes before was not answered.
    """
    clients = Clients(addr, api_key)
    with clients:
        model = _name(clients, load)
        rounds = [_round(clients, load, number) for number in range(runs)]
    failures = Counter(answer.failure for answers in rounds for answer in answers if answer.failure)
    return Result(
        bench="serve",
        machine=machine(),
        model={"name": model},
        settings={
            "runs": runs,
            "rate": load.rate,
            "requests": load.requests,
            "prompt_words": load.prompt_words,
            "max_tokens": load.max_tokens,
            "seed": load.seed,
        },
        figures=FIGURES,
        rounds=[figures(answers) for answers in rounds],
        also={"failures": dict(sorted(failures.items()))},
        notes=[f"failed with {code}: {count}" for code, count in sorted(failures.items())],
    )


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Of one round, by key; times are left out where no request was answered."""
    good = [answer for answer in answers if not answer.failure]
    values: dict[str, float] = {}
    times = {
        "first_token": [answer.tokens[0] - answer.due for answer in good if answer.tokens],
        "between_tokens": [after - before for answer in good for before, after in pairwise(answer.tokens)],
        "end_to_end": [answer.end - answer.due for answer in good],
    }
    for name, seconds in times.items():
        for percent in PERCENTILES:
            if seconds:
                values[f"{name}_p{percent}_ms"] = 1000 * percentile(seconds, percent)
    # Where this is no small part of the times above, this machine was the slow one, not the worker.
    values["sent_late_p99_ms"] = 1000 * percentile([answer.sent - answer.due for answer in answers], 99)
    lasted = max(answer.end for answer in answers) - min(answer.due for answer in answers)
    values["output_tok_s"] = sum(answer.made for answer in good) / lasted
    values["prompt_tok_s"] = sum(answer.prompt for answer in good) / lasted
    values["requests_per_s"] = len(good) / lasted
    values["failed"] = len(answers) - len(good)
    return values


def percentile(values: Sequence[float], percent: int) -> float:
    """The least value that is not below ``percent`` of them in a hundred."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


class Clients:
    """Clients of one worker, each for one request at a time, made before they are needed and used again."""

    def __init__(self, addr: str, api_key: str | None) -> None:
        self._addr, self._key = addr, api_key
        self._idle: queue.SimpleQueue[WorkerClient] = queue.SimpleQueue()
        self._all: list[WorkerClient] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._all:
            client.__exit__(None, None, None)

    def take(self) -> "WorkerClient":
        """One that is idle, or a new one. The main thread alone asks."""
        from rbee_worker.client import WorkerClient  # noqa: PLC0415 - httpx

        try:
            return self._idle.get_nowait()
        except queue.Empty:
            self._all.append(WorkerClient(self._addr, self._key))
            return self._all[-1]

    def give(self, client: "WorkerClient") -> None:
        """It is idle again. Any thread may say so."""
        self._idle.put(client)


def _name(clients: Clients, load: Load) -> str:
    """The model's name, by a short request that also wakes what is lazy."""
    client = clients.take()
    events = list(client.generate(Load(1, 1, SHORTEST, 1, load.seed).request(SHORTEST)))
    clients.give(client)
    return next(event.model for event in events if isinstance(event, Started))


def _round(clients: Clients, load: Load, number: int) -> list[Answer]:
    """Send the requests of a round when they are due; their answers in that order."""
    answers, threads = [], []
    began = time.monotonic()
    for due, words in load.arrivals(number):
        # Made before the request is due: to read the authorities of TLS takes longer than to send it.
        client, request = clients.take(), load.request(words)
        answer = Answer(began + due)
        # Daemons: an interrupt does not wait for them. The connections close with the process, and the jobs with them.
        thread = threading.Thread(target=_ask, args=(clients, client, request, answer), daemon=True)
        time.sleep(max(0.0, answer.due - time.monotonic()))
        thread.start()
        answers.append(answer)
        threads.append(thread)
    for thread in threads:
        thread.join()
    return answers


def _ask(clients: Clients, client: "WorkerClient", request: GenerationRequest, answer: Answer) -> None:
    answer.sent = time.monotonic()
    try:
        for event in client.generate(request):
            now = time.monotonic()
            if isinstance(event, Started):
                answer.prompt = event.prompt_tokens
            elif isinstance(event, Token):
                answer.tokens.append(now)
            elif isinstance(event, End):
                answer.made = event.tokens_out
    except RbeeError as error:
        answer.failure = error.code
    except Exception as error:  # noqa: BLE001 - a thread's failure is a request's, and is counted
        answer.failure = type(error).__name__
    answer.end = time.monotonic()
    clients.give(client)
