"""Frozen settings. The command line and the request schemas read their defaults and ranges from here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self, TypedDict

from rbee_worker.errors import FieldError, InvalidRequest

DTypeName = Literal["auto", "bfloat16", "float16", "float32"]
DTYPES: tuple[DTypeName, ...] = ("auto", "bfloat16", "float16", "float32")

Quantization = Literal["none", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8")

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""Name of the embedded default model."""


class Message(TypedDict):
    """One chat message, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of numbers; ``above`` excludes its lower end."""

    low: float | None = None
    high: float | None = None
    above: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )

    def __str__(self) -> str:
        parts = []
        if self.low is not None:
            parts.append(f">= {self.low:g}")
        if self.above is not None:
            parts.append(f"> {self.above:g}")
        if self.high is not None:
            parts.append(f"<= {self.high:g}")
        return " and ".join(parts)


SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1
"""A seed is 64 bits, read as signed or unsigned; both name the same generator state."""

MAX_STOP_SEQUENCES = 16
MAX_JOB_ID_LENGTH = 128

RANGES: Mapping[str, Range] = {
    "max_tokens": Range(low=1),
    "temperature": Range(low=0, high=2),
    "top_p": Range(low=0, high=1),
    "top_k": Range(low=0),
    "min_p": Range(low=0, high=1),
    "repetition_penalty": Range(above=0, high=2),
    "presence_penalty": Range(low=-2, high=2),
    "frequency_penalty": Range(low=-2, high=2),
}
"""Bounds of the numeric sampling parameters (see docs/http-api.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    Attributes:
        max_tokens: tokens to generate at most; None: what is left of the context.
        temperature: 0 is greedy.
        top_p: nucleus; 1 is off. 0 keeps the likeliest token only.
        top_k: 0 is off.
        min_p: drops tokens less likely than ``min_p`` times the likeliest; 0 is off.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output
            (CTRL, arXiv:1909.05858).
        presence_penalty: subtracted from the logits of tokens generated before (OpenAI's definition).
        frequency_penalty: subtracted once per earlier occurrence in the output (OpenAI's definition).
        seed: None: chosen at random and reported.
        stop: strings that end generation; they are not part of the text.
        ignore_eos: go on past end-of-sequence tokens.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InvalidRequest: listing every field out of range.
        """
        bad = [
            FieldError(name, str(bounds), f"{name} is {value:g}; it must be {bounds}.")
            for name, bounds in RANGES.items()
            if (value := getattr(self, name)) is not None and value not in bounds
        ]
        if self.seed is not None and not SEED_MIN <= self.seed <= SEED_MAX:
            bad.append(FieldError("seed", "64-bit integer", "seed does not fit in 64 bits."))
        if len(self.stop) > MAX_STOP_SEQUENCES:
            message = f"stop holds {len(self.stop)} strings; {MAX_STOP_SEQUENCES} are allowed."
            bad.append(FieldError("stop", f"at most {MAX_STOP_SEQUENCES} strings", message))
        if any(not text for text in self.stop):
            bad.append(FieldError("stop", "non-empty strings", "stop holds an empty string."))
        if bad:
            raise InvalidRequest(" ".join(error.message for error in bad), fields=bad)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One job: a prompt, or messages for the chat template, and how to continue it.

    Attributes:
        prompt: text to continue; exactly one of ``prompt`` and ``messages`` is given.
        messages: rendered with the model's chat template.
        raw: take ``prompt`` as it is; without it a prompt is wrapped as one user message when the model has a
            chat template.
        job_id: unique among running jobs; None: a new UUID.
    """

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    raw: bool = True
    job_id: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)

    @classmethod
    def from_text(cls, text: str, *, system: str | None, raw: bool, sampling: SamplingParams) -> Self:
        """What the command line means by ``--prompt``, ``--system`` and ``--raw``."""
        if raw or system is None:
            return cls(prompt=text, raw=raw, sampling=sampling)
        messages = (Message(role="system", content=system), Message(role="user", content=text))
        return cls(messages=messages, raw=False, sampling=sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is placed and run.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        dtype: of the weights; ``auto`` is what is fast and right on the device. With ``quantize``: of the embedding.
        quantize: ``int8`` turns the matrices into int8 as they are loaded (see docs/quantization.md).
        max_context: context length in tokens to serve; None: the model's own.
        max_batch_size: sequences that run in one step at most.
        prefill_chunk: prompt tokens processed in one step at most.
        stall_seconds: silence from the disk after which ``stalled`` is said.
    """

    device: str = "auto"
    dtype: DTypeName = "auto"
    quantize: Quantization = "none"
    max_context: int | None = None
    max_batch_size: int = 8
    prefill_chunk: int = 512
    stall_seconds: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the worker is reached.

    Attributes:
        host, port: the address bound; port 0 lets the system choose.
        api_keys: accepted bearer tokens; none: no key is asked for.
        allow_unauthenticated: bind other than loopback addresses without a key.
        allow_models: models that clients may ask to load, beside the one given at start.
        max_queue: requests waiting for their turn at most.
        keep_alive_seconds: silence on a stream after which a comment line is sent; 0: never.
        shutdown_grace_seconds: how long running streams may go on after SIGTERM.
        max_body_bytes: size of a request body at most.
        send_timeout_seconds: how long a client may leave a stream's bytes unread.
        hold_requests: keep streaming requests that arrive during a load waiting, instead of refusing them.
        exit_on_load_error: end the process with the load's exit code when the first load fails.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    allow_unauthenticated: bool = False
    allow_models: tuple[str, ...] = ()
    max_queue: int = 64
    keep_alive_seconds: float = 10.0
    shutdown_grace_seconds: float = 30.0
    max_body_bytes: int = 4 * 1024 * 1024
    send_timeout_seconds: float = 60.0
    hold_requests: bool = False
    exit_on_load_error: bool = False
