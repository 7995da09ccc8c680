"""Frozen settings. The command line and the request schemas read their defaults and ranges from here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Self, TypedDict, get_args

from rbee_worker.errors import FieldError, InvalidRequest

DTypeName = Literal["auto", "bfloat16", "float16", "float32"]
DTYPES: tuple[DTypeName, ...] = get_args(DTypeName)

Quantization = Literal["none", "int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""Name of the default model."""


class Message(TypedDict):
    """One chat message in the form that chat templates take. Optional keys are those of OpenAI's messages."""

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
        text: the schema as JSON text, the regular expression, or the grammar; empty for ``json_object``.
        field: the name, for messages, of the field or option in which it was given.
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
"""llguidance's options for JSON on one line. If more white space is allowed, small models fill the context with it."""


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of numbers. ``low`` and ``high`` belong to it, ``above`` does not. None: no limit."""

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
"""A seed is 64 bits. Read as signed or as unsigned, the same bits give the same generator state."""

MAX_STOP_SEQUENCES = 16
MAX_STOP_LENGTH = 1024
"""Characters of one stop string. Text that may become a stop string is held back from the stream."""
MAX_JOB_ID_LENGTH = 128
MAX_LOGPROBS = 20
"""How many of the likeliest tokens can be listed with each token."""
MAX_SPECULATION = 16
"""Drafts of one sequence in one step."""
MAX_LOGIT_BIAS = 1024
"""Entries of ``logit_bias``."""
MAX_GRAMMAR_BYTES = 64 * 1024
"""UTF-8 bytes of a JSON schema, regular expression or grammar."""

LOGIT_BIAS_RANGE = Range(low=-100, high=100)
CHOICES_RANGE = Range(low=1, high=128)
"""How many answers one request may ask for (OpenAI's ``n``), for all its prompts together."""
TIMEOUT_RANGE = Range(above=0, high=86_400)
"""Seconds that a request may set as its timeout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """The description of a sampling parameter, written once for every place that takes it.

    Attributes:
        help: a sentence for the description of requests, in Markdown.
        range: the allowed numbers; None: it is not a number, or it is checked separately.
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
    """How tokens are chosen, and when to stop. The ``Param`` of a field says what it means and what it may be.

    Request bodies, the options of commands and the tables in ``docs`` take the fields from here, in this order.

    ``repetition_penalty`` is that of CTRL (arXiv:1909.05858). The other penalties and ``logit_bias`` are OpenAI's;
    here ``logit_bias`` is pairs of token id and bias. Log-probabilities are the model's own, before penalties, bias,
    temperature and truncation; None: they are not computed.
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
            InvalidRequest: a field is out of range; the error lists every such field.
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
"""Name of a sampling parameter -> its description."""

RANGES: Mapping[str, Range] = {name: param.range for name, param in PARAMS.items() if param.range is not None}
"""Name of a numeric sampling parameter -> its range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One job: a prompt, or messages for the chat template, and how to continue it.

    Attributes:
        prompt: text to continue. Exactly one of ``prompt``, ``prompt_ids`` and ``messages`` is given.
        prompt_ids: token ids to continue, used as they are.
        messages: a conversation for the model's chat template.
        template_variables: further values for the chat template, such as ``tools`` and ``documents``.
        raw: whether ``prompt`` is used as it is. If not, and the model has a chat template, the prompt becomes one user
            message.
        job_id: unique among running jobs; None: a new UUID.
        prompt_progress: whether to emit how much of the prompt has been prefilled.
        client: the name of the client. Waiting clients take turns. Empty: not known.
        timeout_seconds: counted from submission. A job that takes longer ends with an error. None: no limit.
        sampling: how tokens are chosen, and when to stop.
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
        """The request for a prompt with an optional system message (``--prompt``, ``--system``, ``--raw``)."""
        if raw or system is None:
            return cls(prompt=text, raw=raw, sampling=sampling)
        messages = (Message(role="system", content=system), Message(role="user", content=text))
        return cls(messages=messages, raw=False, sampling=sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is placed and run.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        dtype: of the weights; ``auto``: the best for the device. With ``quantize``: of what is not quantized.
        quantize: what matrices are quantized to while they are loaded (see docs/quantization.md). ``int4`` needs the
            CPU kernels.
        mmap: whether matrices that run as they are stored are used where their files are mapped, on local storage.
        max_context: context length in tokens; None: the model's default.
        max_batch_size: how many sequences may run in one step.
        prefill_chunk: how many prompt tokens may be prefilled in one step. While sequences decode, an eighth of it.
        kv_cache_memory: bytes of device memory for the KV cache of all sequences; None: what ``max_batch_size`` whole
            contexts need, within a share of the free memory.
        kv_cache_dtype: of keys and values; ``auto``: that of the activations, or 16 bits with the CPU kernels.
        prefix_cache: whether to keep keys and values, and reuse them for prompts with the same beginning.
        speculate: how many drafts of a sequence prompt lookup may make for one step; 0: none.
        stall_seconds: ``stalled`` is emitted when no byte has arrived for so long.
    """

    device: str = "auto"
    dtype: DTypeName = "auto"
    quantize: Quantization = "none"
    mmap: bool = False
    max_context: int | None = None
    max_batch_size: int = 8
    prefill_chunk: int = 512
    kv_cache_memory: int | None = None
    kv_cache_dtype: DTypeName = "auto"
    prefix_cache: bool = True
    speculate: int = 0
    stall_seconds: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """What one load may set otherwise than the worker is configured, as :class:`EngineConfig` has it; None: nothing."""

    device: str | None = None
    dtype: DTypeName | None = None
    quantize: Quantization | None = None
    mmap: bool | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


AS_CONFIGURED = LoadSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server is reached, and its limits.

    Attributes:
        host, port: the address to bind; port 0 lets the system choose.
        api_keys: accepted bearer tokens. Without any, and without a file, no key is needed.
        api_key_file: a file with more of them, one a line; read again on SIGHUP.
        allow_unauthenticated: whether to bind addresses other than loopback without a key.
        trusted_hosts: names that ``Host`` may have, beside this machine's own; ``*.example.org`` stands for every name
            below it. Empty: any name where a key is needed or ``allow_unauthenticated`` is set.
        trusted_proxies: addresses and networks of proxies whose ``X-Forwarded-For`` tells the client's address.
        cors_origins: origins whose pages may use the worker from a browser; ``*``: all of them.
        tls_cert, tls_key: PEM files. With a certificate the worker uses HTTPS. Without ``tls_key`` the key is in the
            certificate's file.
        tls_key_password: the password of an encrypted key.
        allow_models: models that clients may load, beside the one given at start.
        served_model_names: names that OpenAI's clients may use for the model, beside its own. Answers have the first.
        max_connections: how many connections are served at a time. On more, only health and readiness are answered.
        header_seconds: how long the head of a request may take to arrive.
        body_seconds: how long a request's body may take to arrive.
        idle_seconds: how long a connection may stay open between two requests.
        max_queue: how many requests may wait for their turn.
        keep_alive_seconds: after so long a silence on a stream a comment line is sent; 0: never.
        shutdown_grace_seconds: how long running streams may go on after SIGTERM.
        max_body_bytes: the largest size of a request body.
        send_timeout_seconds: how long a client may leave a stream's bytes unread.
        hold_requests: whether streaming requests that arrive during a load wait, instead of being refused.
        exit_on_load_error: whether the process ends with the load's exit code when the first load fails.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: Path | None = None
    allow_unauthenticated: bool = False
    trusted_hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_key_password: str | None = field(default=None, repr=False)
    allow_models: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    max_connections: int = 4096
    header_seconds: float = 20.0
    body_seconds: float = 60.0
    idle_seconds: float = 65.0
    max_queue: int = 64
    keep_alive_seconds: float = 10.0
    shutdown_grace_seconds: float = 30.0
    max_body_bytes: int = 4 * 1024 * 1024
    send_timeout_seconds: float = 60.0
    hold_requests: bool = False
    exit_on_load_error: bool = False
