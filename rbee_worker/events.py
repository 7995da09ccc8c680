"""The events of loads and jobs. The runtime emits them, Rich draws them, ``--json`` prints them, SSE carries them.

Loading, in this order (``?`` may be absent, ``*`` may repeat)::

    resolving  downloading*  loading_to_vram+  warming_up  ready
                                                         | error | cancelled      (terminal: exactly one, last)

``stalled`` may come between any two of them; ``error`` and ``cancelled`` may end the load at any point after
``resolving``. ``seq`` counts up from 0 without gaps within one load, ``elapsed_seconds`` never goes down, and
``layers_loaded`` never goes down per device and reaches ``layers_total``.

Inference, one stream per job::

    started  prompt_progress*  prompt_logprobs?  token*  end | error
    end                             (cancelled while it waited)
    error                           (refused)

``token`` events are numbered from 0 by ``i``; the concatenation of their ``t`` is the generated text.
``prompt_progress`` and ``prompt_logprobs`` come only where the request asks for them.

The JSON form of an event (:func:`to_dict`, :func:`to_json`) puts the discriminator first (``stage`` or ``event``)
and leaves out fields whose value is None.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from rbee_worker.escape import one_line, quoted
from rbee_worker.shapes import from_json

StopReason = Literal["max_tokens", "eos", "stop_sequence", "cancelled", "context_full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a finished load did, carried by :class:`Ready`.

    Attributes:
        model: the model's name as resolved.
        architecture: the Hugging Face architecture name, such as ``LlamaForCausalLM``.
        parameters: number of weights.
        dtype: the dtype the weights are held in (``float16``, ``bfloat16``, ``float32``).
            With ``quantize``: of what is not quantized.
        quantize: ``none``, or ``int8`` or ``int4`` where matrices were to be quantized as they were loaded.
        saved_mb: MiB of weights less than ``quantize`` ``none`` holds in 16 bits on this device; 0 with ``none``.
        kernel: the form in which the linear layers run, such as ``packed-bf16``.
        cpu_kernels: the worker's own kernels that run in this process, or why none do; empty where no CPU is used.
        phases: seconds per phase, in order: ``resolving``, ``downloading`` (when something was fetched),
            ``loading_to_vram``, ``warming_up``.
        storage: the file system that held them, and how it was read: ``ext4, local``. With ``mmap`` it ends in
            ``mapped`` or ``not mapped``.
        stored_as: what the files hold: ``BF16``, or ``gptq 4-bit, groups of 128, dequantized``.
        runs_as: what the matrices are multiplied as: ``Q4_K, Q6_K``, ``bfloat16``, ``int8``; where that differs from
            the blocks that a file holds, why.
        bytes_read: bytes read from the model's files.
        bytes_per_second: ``bytes_read`` over the seconds of ``loading_to_vram``.
        device_mb: MiB of weights resident per device.
        mapped_mb: MiB of these that are used where their files are mapped; the system may drop and read them again.
        context_length: tokens of prompt and output together at most.
        kv_cache_tokens: tokens of all sequences together whose keys and values find room.
        kv_cache_mb: MiB of memory for them; on a CPU it is taken as they are written.
        kv_cache_dtype: their dtype.
        peak_host_mb: the process's peak resident memory in MiB, as the operating system counts it.
    """

    model: str
    architecture: str
    parameters: int
    dtype: str
    kernel: str
    phases: Mapping[str, float]
    bytes_read: int
    bytes_per_second: int
    device_mb: Mapping[str, int]
    peak_host_mb: int
    storage: str = ""
    stored_as: str = ""
    runs_as: str = ""
    cpu_kernels: str = ""
    quantize: str = "none"
    saved_mb: int = 0
    mapped_mb: int = 0
    context_length: int = 0
    kv_cache_tokens: int = 0
    kv_cache_mb: int = 0
    kv_cache_dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingEvent:
    """Base of the loading events."""

    stage: ClassVar[str]
    terminal: ClassVar[bool] = False

    seq: int
    elapsed_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolving(LoadingEvent):
    """First event of a load: the model's name is being turned into local files."""

    stage: ClassVar[str] = "resolving"
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloading(LoadingEvent):
    """Hub models only. ``speed_mbps`` is megabytes (10^6) a second."""

    stage: ClassVar[str] = "downloading"
    bytes_downloaded: int
    bytes_total: int
    speed_mbps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingToVram(LoadingEvent):
    """After each decoder layer is resident on its device, and at least twice a second within a long one.

    Attributes:
        layers_loaded: decoder layers whose bytes are where they will be used.
        layers_total: the model's ``num_hidden_layers``.
        vram_mb: MiB of device memory (on CPU: RAM) holding this model's weights.
        vram_total_mb: MiB of memory the device has.
        device: ``cuda:0``, ``cpu``, ``mps``.
        bytes_loaded: bytes of the model's files read so far; ``bytes_total``: all of them.
        bytes_per_second: mean rate since reading began.
        eta_seconds: remaining bytes over that rate; null until a rate is known.
    """

    stage: ClassVar[str] = "loading_to_vram"
    layers_loaded: int
    layers_total: int
    vram_mb: int
    vram_total_mb: int
    device: str
    bytes_loaded: int
    bytes_total: int
    bytes_per_second: int
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmingUp(LoadingEvent):
    """Weights are resident; the cache is being allocated and a first pass run."""

    stage: ClassVar[str] = "warming_up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stalled(LoadingEvent):
    """No byte arrived for ``seconds``; loading goes on. ``where`` names the file being read."""

    stage: ClassVar[str] = "stalled"
    seconds: float
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(LoadingEvent):
    """Terminal: the model serves."""

    stage: ClassVar[str] = "ready"
    terminal: ClassVar[bool] = True
    report: LoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed(LoadingEvent):
    """Terminal: the load failed; ``code`` is that of the error."""

    stage: ClassVar[str] = "error"
    terminal: ClassVar[bool] = True
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCancelled(LoadingEvent):
    """Terminal: the load was cancelled and its memory given back."""

    stage: ClassVar[str] = "cancelled"
    terminal: ClassVar[bool] = True
    vram_mb_freed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceEvent:
    """Base of the events of one job."""

    event: ClassVar[str]
    terminal: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(InferenceEvent):
    """The job has its place in the batch. ``started_at`` is UTC, RFC 3339 with milliseconds."""

    event: ClassVar[str] = "started"
    job_id: str
    model: str
    started_at: str
    prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptProgress(InferenceEvent):
    """How far the prompt has been processed, after each step that takes some of it.

    Attributes:
        total: tokens of the prompt.
        cached: those whose keys and values were reused.
        processed: those done, ``cached`` included.
        elapsed_ms: milliseconds since admission.
    """

    event: ClassVar[str] = "prompt_progress"
    total: int
    cached: int
    processed: int
    elapsed_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token and the model's natural log-probability of it; null for the first of a prompt, which nothing predicts.

    Attributes:
        id: token id.
        token: its text alone; bytes that are no UTF-8 show as U+FFFD.
        bytes: its bytes.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens at its place, likeliest first; their own ``top`` is empty.
    """

    id: int
    token: str
    bytes: tuple[int, ...]
    logprob: float | None
    top: "tuple[TokenLogprob, ...]" = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs(InferenceEvent):
    """The log-probabilities of the prompt's tokens, all of them, in order."""

    event: ClassVar[str] = "prompt_logprobs"
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token(InferenceEvent):
    """A piece of text: whole characters only.

    Attributes:
        t: the text.
        i: counts these events from 0.
        logprobs: of the tokens that make the text, where the request asks for them.
    """

    event: ClassVar[str] = "token"
    t: str
    i: int
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class End(InferenceEvent):
    """Terminal.

    Attributes:
        tokens_out: tokens generated, without the end-of-sequence token.
        decode_time_ms: milliseconds from the first generated token to the last; that of the end-of-sequence token is
            not counted, as the token is not.
        stop_reason: why generation ended.
        stop_sequence_matched: the stop string, when ``stop_reason`` is ``stop_sequence``.
        prompt_tokens: tokens of the prompt.
        cached_tokens: prompt tokens whose keys and values were reused.
        prefill_time_ms: milliseconds from admission to the first generated token.
        tokens_per_second: decode rate: tokens after the first over ``decode_time_ms``; 0 when there is none.
    """

    event: ClassVar[str] = "end"
    terminal: ClassVar[bool] = True
    tokens_out: int
    decode_time_ms: int
    stop_reason: StopReason
    stop_sequence_matched: str | None = None
    prompt_tokens: int
    cached_tokens: int
    prefill_time_ms: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceFailed(InferenceEvent):
    """Terminal: the job failed; ``code`` is that of the error."""

    event: ClassVar[str] = "error"
    terminal: ClassVar[bool] = True
    code: str
    message: str


Event = LoadingEvent | InferenceEvent

_STAGES: Mapping[str, type[LoadingEvent]] = {
    cls.stage: cls
    for cls in (Resolving, Downloading, LoadingToVram, WarmingUp, Stalled, Ready, LoadFailed, LoadCancelled)
}
_EVENTS: Mapping[str, type[InferenceEvent]] = {
    cls.event: cls for cls in (Started, PromptProgress, PromptLogprobs, Token, End, InferenceFailed)
}


def to_dict(event: Event) -> dict[str, Any]:
    """The JSON object of an event: discriminator, own fields, then ``seq`` and ``elapsed_seconds``."""
    out: dict[str, Any] = {}
    tail: tuple[str, ...] = ()
    if isinstance(event, LoadingEvent):
        out["stage"] = event.stage
        tail = ("seq", "elapsed_seconds")
    else:
        out["event"] = event.event
    names = [f.name for f in fields(event) if f.name not in tail]
    for name in (*names, *tail):
        value = getattr(event, name)
        if value is not None:
            out[name] = _plain(value)
    return out


def to_json(event: Event) -> str:
    """The JSON of an event on one line, not escaped to ASCII: the ``data`` of an SSE frame, or a line of ``--json``."""
    return json.dumps(to_dict(event), ensure_ascii=False, separators=(",", ":"))


class UnknownEvent(ValueError):
    """The object is no event of this version: a newer worker's, or something else."""


def from_dict(data: Mapping[str, Any]) -> Event:
    """The event that a JSON object describes. Unknown keys are ignored, because newer workers may send more.

    Raises:
        UnknownEvent: it has neither a known ``stage`` nor a known ``event``.
        ValueError: the event lacks a field, or a field is of another type.
    """
    stage, event = data.get("stage"), data.get("event")
    cls: type[Event] | None = _STAGES.get(stage) if isinstance(stage, str) else None
    if cls is None and isinstance(event, str):
        cls = _EVENTS.get(event)
    if cls is None:
        raise UnknownEvent(f"not an event: neither a known 'stage' nor a known 'event' in {quoted(sorted(data))}")
    try:
        return from_json(cls, data)
    except TypeError as error:
        raise ValueError(f"incomplete {cls.__name__} event: {error}") from None
    except ValueError as error:
        raise ValueError(f"malformed {cls.__name__} event: {one_line(str(error))}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, LoadReport):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, TokenLogprob):
        plain = {"id": value.id, "token": value.token, "bytes": list(value.bytes), "logprob": value.logprob}
        return plain | {"top": _plain(value.top)} if value.top else plain
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value
