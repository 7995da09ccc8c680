"""Frozen settings. The command line and the request schemas read their defaults and ranges from here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Self, TypedDict, get_args

from rbee_worker.errors import FieldError, InvalidRequest

DTypeName = Literal["auto", "bfloat16", "float16", "float32"]
DTYPES: tuple[DTypeName, ...] = get_args(DTypeName)

Quantization = Literal["none", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""Name of the embedded default model."""


class Message(TypedDict):
    """One chat message, as chat templates take it; the keys beside the first two are those of OpenAI's messages."""

    role: str
    content: str | None
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What the generated text must match.

    Attributes:
        kind: ``json_object`` (any JSON object), ``json_schema``, ``regex``, or ``lark`` (a grammar in llguidance's
            dialect of Lark).
        text: the schema as JSON text, the expression, or the grammar; empty for ``json_object``.
        field: the field or option that it was given in, for messages.
    """

    kind: GrammarKind
    text: str = ""
    field: str = field(default="grammar", compare=False)


JSON_LAYOUT: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ", ?",
    "key_separator": ": ?",
}
"""llguidance's options for JSON on one line: small models fill the context with white space where more is allowed."""


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
MAX_STOP_LENGTH = 1024
"""Characters of one stop string; text that may become one is held back from the stream."""
MAX_JOB_ID_LENGTH = 128
MAX_LOGPROBS = 20
"""Likeliest tokens that can be told with each generated one."""
MAX_SPECULATION = 16
"""Tokens guessed at once."""
MAX_LOGIT_BIAS = 1024
"""Entries of ``logit_bias``."""
MAX_GRAMMAR_BYTES = 64 * 1024
"""UTF-8 bytes of a JSON schema, regular expression or grammar."""

LOGIT_BIAS_RANGE = Range(low=-100, high=100)
CHOICES_RANGE = Range(low=1, high=128)
"""Answers that one request may ask for (OpenAI's ``n``), all its prompts together."""
TIMEOUT_RANGE = Range(above=0, high=86_400)
"""Seconds that a request may give itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """What is to be said of a sampling parameter: once, for every place that takes it.

    Attributes:
        help: a sentence for the description of requests, in Markdown.
        range: the numbers that it may be; None: it is no number, or is checked in a way of its own.
        option: a sentence for ``--help``; None: commands have no such option. Numbers, tuples of strings, and booleans
            that are false by default can be options.
        unset: what the default None or ``()`` means, for tables.
    """

    help: str
    range: Range | None = None
    option: str | None = None
    unset: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. What a field means and may be stands in its ``Param``.

    Request bodies, the options of commands and the tables in ``docs`` take the fields from here, in this order.

    ``repetition_penalty`` is that of CTRL (arXiv:1909.05858), the other penalties are OpenAI's; so is ``logit_bias``,
    here as pairs of token id and bias. Log-probabilities are the model's own, before penalties, bias, temperature and
    truncation; None tells none.
    """

    max_tokens: Annotated[
        int | None,
        Param(
            help="Tokens to generate at most; by default what is left of the context.",
            range=Range(low=1),
            option="Tokens to make at most; without it: what is left of the context.",
            unset="what is left of the context",
        ),
    ] = None
    temperature: Annotated[
        float,
        Param(
            help="0 takes the likeliest token.",
            range=Range(low=0, high=2),
            option="0 always takes the likeliest token.",
        ),
    ] = 1.0
    top_p: Annotated[
        float,
        Param(
            help="Nucleus sampling; 1 is off, 0 keeps the likeliest token only.",
            range=Range(low=0, high=1),
            option="Keep the likeliest tokens up to this probability; 1 is off.",
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        Param(
            help="0 is off.",
            range=Range(low=0),
            option="Keep this many of the likeliest tokens; 0 is off.",
        ),
    ] = 0
    min_p: Annotated[
        float,
        Param(
            help="Drops tokens less likely than this times the likeliest; 0 is off.",
            range=Range(low=0, high=1),
            option="Drop tokens less likely than this share of the likeliest; 0 is off.",
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Param(
            help="Divides positive and multiplies negative logits of tokens seen in prompt or text.",
            range=Range(above=0, high=2),
            option="Divides the logits of tokens seen before; 1 is off.",
        ),
    ] = 1.0
    presence_penalty: Annotated[
        float,
        Param(
            help="Subtracted from the logits of tokens generated before.",
            range=Range(low=-2, high=2),
            option="Taken from the logits of tokens made before; 0 is off.",
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        Param(
            help="Subtracted once for each earlier occurrence in the text.",
            range=Range(low=-2, high=2),
            option="Taken once for each time a token was made; 0 is off.",
        ),
    ] = 0.0
    seed: Annotated[
        int | None,
        Param(
            help="64 bits, signed or unsigned; by default random.",
            option="64 bits; the same seed gives the same text. Without it: random.",
        ),
    ] = None
    stop: Annotated[
        tuple[str, ...],
        Param(
            help="Strings that end the text; they are not part of it.",
            option=f"Stop before this text; may be given up to {MAX_STOP_SEQUENCES} times.",
        ),
    ] = ()
    ignore_eos: Annotated[bool, Param(help="Go on past end-of-sequence tokens, for benchmarks.")] = False
    skip_special_tokens: Annotated[bool, Param(help="Leave special tokens out of the text.")] = True
    logit_bias: Annotated[
        tuple[tuple[int, float], ...],
        Param(help="Token ids and what is added to their logits; -100 bans a token."),
    ] = ()
    logprobs: Annotated[
        int | None,
        Param(
            help="Tell each token's log-probability and those of this many likeliest ones.",
            range=Range(low=0, high=MAX_LOGPROBS),
        ),
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        Param(
            help="The same for the tokens of the prompt, before the first token.",
            range=Range(low=0, high=MAX_LOGPROBS),
        ),
    ] = None
    grammar: Annotated[GrammarSpec | None, Param(help="What the text must match.")] = None

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
        if any(len(text) > MAX_STOP_LENGTH for text in self.stop):
            message = f"stop holds a string of over {MAX_STOP_LENGTH} characters."
            bad.append(FieldError("stop", f"at most {MAX_STOP_LENGTH} characters each", message))
        if any(not text for text in self.stop):
            bad.append(FieldError("stop", "non-empty strings", "stop holds an empty string."))
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            message = f"logit_bias holds {len(self.logit_bias)} entries; {MAX_LOGIT_BIAS} are allowed."
            bad.append(FieldError("logit_bias", f"at most {MAX_LOGIT_BIAS} entries", message))
        if any(bias not in LOGIT_BIAS_RANGE for _, bias in self.logit_bias):
            message = f"logit_bias holds a bias that is not {LOGIT_BIAS_RANGE}."
            bad.append(FieldError("logit_bias", f"biases {LOGIT_BIAS_RANGE}", message))
        if bad:
            raise InvalidRequest(" ".join(error.message for error in bad), fields=bad)


PARAMS: Mapping[str, Param] = {field.name: get_args(field.type)[1] for field in fields(SamplingParams)}
"""What is said of each sampling parameter, by its name."""

RANGES: Mapping[str, Range] = {name: param.range for name, param in PARAMS.items() if param.range is not None}
"""Bounds of the numeric sampling parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One job: a prompt, or messages for the chat template, and how to continue it.

    Attributes:
        prompt: text to continue; exactly one of ``prompt``, ``prompt_ids`` and ``messages`` is given.
        prompt_ids: token ids to continue, taken as they are.
        messages: rendered with the model's chat template.
        template_variables: further values for the chat template, such as ``tools`` and ``documents``.
        raw: take ``prompt`` as it is; without it a prompt is wrapped as one user message when the model has a
            chat template.
        job_id: unique among running jobs; None: a new UUID.
        prompt_progress: tell how much of the prompt has been processed, as it is.
        client: who asks; clients that wait take turns. Empty: nobody in particular.
        timeout_seconds: from submission; a job that takes longer ends with an error. None: no limit.
    """

    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = True
    job_id: str | None = None
    prompt_progress: bool = False
    client: str = ""
    timeout_seconds: float | None = None
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
        prefill_chunk: prompt tokens processed in one step at most; beside running answers, an eighth of it.
        kv_cache_memory: bytes of device memory for the keys and values of all sequences; None: what
            ``max_batch_size`` whole contexts need, within a share of what is free.
        prefix_cache: keep the keys and values of what was processed, and reuse them where a prompt begins alike.
        speculate: tokens to guess by prompt lookup and check in one pass, per sequence; 0: none.
        stall_seconds: silence from the disk after which ``stalled`` is said.
    """

    device: str = "auto"
    dtype: DTypeName = "auto"
    quantize: Quantization = "none"
    max_context: int | None = None
    max_batch_size: int = 8
    prefill_chunk: int = 512
    kv_cache_memory: int | None = None
    prefix_cache: bool = True
    speculate: int = 0
    stall_seconds: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the worker is reached.

    Attributes:
        host, port: the address bound; port 0 lets the system choose.
        api_keys: accepted bearer tokens; none, and no file: no key is asked for.
        api_key_file: more of them, one a line; read again on SIGHUP.
        allow_unauthenticated: bind other than loopback addresses without a key.
        trusted_hosts: names that ``Host`` may say, beside this machine's own; ``*.example.org`` stands for every name
            below it. None: any name where a key is asked for.
        cors_origins: origins whose pages may use the worker from a browser; ``*``: all of them.
        tls_cert, tls_key: PEM files; a certificate makes the worker speak HTTPS. Without ``tls_key`` the key is in
            the certificate's file.
        tls_key_password: of an encrypted key.
        allow_models: models that clients may ask to load, beside the one given at start.
        served_model_names: what OpenAI's clients may call the model, beside its own name; the first is what it is
            called in answers.
        max_connections: connections served at a time; on one more, only health and readiness are answered.
        header_seconds: how long a request's head may take to arrive.
        idle_seconds: how long a connection may stay open between two requests.
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
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: Path | None = None
    allow_unauthenticated: bool = False
    trusted_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_key_password: str | None = field(default=None, repr=False)
    allow_models: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    max_connections: int = 4096
    header_seconds: float = 20.0
    idle_seconds: float = 65.0
    max_queue: int = 64
    keep_alive_seconds: float = 10.0
    shutdown_grace_seconds: float = 30.0
    max_body_bytes: int = 4 * 1024 * 1024
    send_timeout_seconds: float = 60.0
    hold_requests: bool = False
    exit_on_load_error: bool = False
