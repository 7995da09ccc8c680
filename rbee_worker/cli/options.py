"""Options that several commands share. Defaults come from ``rbee_worker.config``; help is plain text."""

import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TextIO, TypeVar

import typer

from rbee_worker import log
from rbee_worker.config import (
    DTYPES,
    MAX_SPECULATION,
    QUANTIZATIONS,
    DTypeName,
    EngineConfig,
    LoadSettings,
    Quantization,
    ServerConfig,
)
from rbee_worker.errors import InvalidRequest

T = TypeVar("T")

ENGINE = EngineConfig()
SERVER = ServerConfig()

_UNITS = {"": 1, "b": 1} | {
    name: base**power
    for power, letter in enumerate("kmgt", start=1)
    for name, base in ((f"{letter}b", 1000), (f"{letter}ib", 1024), (letter, 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)

MODEL_PANEL = "Model"
SAMPLING_PANEL = "Sampling"
OUTPUT_PANEL = "Output"
REMOTE_PANEL = "Remote worker"
SERVER_PANEL = "Server"

DTYPE_METAVAR = "|".join(DTYPES)
MODEL_FORMS = "A .safetensors file, a folder in Hugging Face layout, a .gguf file, or a hub id org/name@revision."
MODEL_HELP = MODEL_FORMS + " Without it: SmolLM2-135M-Instruct."
DEVICES = (
    ("auto", "the first GPU, else the CPU"),
    ("cpu", "the CPU"),
    ("cuda", "the first NVIDIA GPU"),
    ("cuda:0", "an NVIDIA GPU by its number"),
    ("mps", "the GPU of an Apple computer"),
)


def _complete_device(incomplete: str) -> list[tuple[str, str]]:
    return [device for device in DEVICES if device[0].startswith(incomplete)]


ModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", envvar="RBEE_MODEL", help=MODEL_HELP)]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        "--model-path",
        metavar="MODEL",
        envvar="RBEE_MODEL",
        help=MODEL_HELP,
        rich_help_panel=MODEL_PANEL,
    ),
]
BesideOption = Annotated[str | None, typer.Argument(metavar="MODEL", help="The same as --model.")]
"""MODEL as an argument of a command that has :data:`ModelOption` too; :func:`either` tells which was given."""
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where the model runs: auto, cpu, cuda, cuda:N or mps.",
        rich_help_panel=MODEL_PANEL,
        autocompletion=_complete_device,
    ),
]
DType = Annotated[
    DTypeName,
    typer.Option(
        "--dtype",
        metavar=DTYPE_METAVAR,
        help="The type weights are held in; auto: the device's best.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Quantize = Annotated[
    Quantization,
    typer.Option(
        "--quantize",
        metavar="|".join(QUANTIZATIONS),
        help="int8 and int4 shrink weights as they are loaded; int4 needs the CPU kernels. --dtype is then the rest's.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Mmap = Annotated[
    bool,
    typer.Option(
        "--mmap",
        help="Use weights that run as they are stored where their file is mapped, on a local disk.",
        rich_help_panel=MODEL_PANEL,
    ),
]
MaxContext = Annotated[
    int | None,
    typer.Option(
        "--max-context",
        metavar="N",
        min=2,
        help="Context length in tokens; without it: the model's own.",
        rich_help_panel=MODEL_PANEL,
    ),
]


def parse_size(text: str | int) -> int:
    """The bytes of a size such as ``512MiB``, ``2GiB``, ``1.5GB`` or a plain number. ``2G`` means ``2GiB``.

    Raises:
        typer.BadParameter: the text is not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write 512MiB, 2GiB, or a number of bytes.")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if size < 1:
        raise typer.BadParameter("The size must be positive.")
    return int(size)


KVCacheMemory = Annotated[
    int | None,
    typer.Option(
        "--kv-cache-memory",
        metavar="SIZE",
        parser=parse_size,
        help="Memory for keys and values, such as 2GiB; without it: a whole context per place, if free.",
        rich_help_panel=MODEL_PANEL,
    ),
]
KVCacheDType = Annotated[
    DTypeName,
    typer.Option(
        "--kv-cache-dtype",
        metavar=DTYPE_METAVAR,
        help="Type of keys and values; auto: 16 bits with the CPU kernels, else that of the activations.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Speculate = Annotated[
    int,
    typer.Option(
        "--speculate",
        metavar="N",
        min=0,
        max=MAX_SPECULATION,
        help="Guess up to N tokens from the text so far and check them in one pass; the text stays the same.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Write JSON to stdout, one object a line.", rich_help_panel=OUTPUT_PANEL)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, report or figures.", rich_help_panel=OUTPUT_PANEL)
]
LogLevel = Annotated[
    log.LogLevel,
    typer.Option(
        "--log-level",
        metavar="|".join(log.LOG_LEVELS),
        help="Least severe log lines shown; debug adds tracebacks.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
LogFormat = Annotated[
    log.LogFormat,
    typer.Option(
        "--log-format",
        metavar="|".join(log.LOG_FORMATS),
        help="Form of the log lines on stderr.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
RemoteAddr = Annotated[
    str | None,
    typer.Option(
        "--addr",
        metavar="HOST:PORT",
        help="Ask the running worker at this address or http(s):// URL.",
        rich_help_panel=REMOTE_PANEL,
    ),
]
RemoteKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", metavar="KEY", envvar="RBEE_API_KEY", help="The worker's API key.", rich_help_panel=REMOTE_PANEL
    ),
]


def in_place_of(name: str, options: Sequence[inspect.Parameter], command: Callable[..., T]) -> Callable[..., T]:
    """Replace the parameter ``name`` of ``command`` by options, whose values it then gets as one dict by name."""

    @functools.wraps(command)
    def run(**given: Any) -> T:
        values = {option.name: given.pop(option.name) for option in options}
        # Only an option that may be repeated gives a list.
        taken = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return command(**given, **{name: taken})

    signature = inspect.signature(command)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += options if parameter.name == name else [parameter]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # Typer reads it
    return run


def engine_options(command: Callable[..., T]) -> Callable[..., T]:
    """Replace the parameter ``engine`` of ``command`` by the options of every command that runs a model.

    ``command`` then gets their values as ``engine``: keyword arguments of :class:`~rbee_worker.config.EngineConfig`.
    """
    kinds: dict[str, Any] = {
        "device": Device,
        "dtype": DType,
        "quantize": Quantize,
        "mmap": Mmap,
        "max_context": MaxContext,
        "kv_cache_memory": KVCacheMemory,
        "kv_cache_dtype": KVCacheDType,
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=getattr(ENGINE, name), annotation=kind) for name, kind in kinds.items()
    ]
    return in_place_of("engine", options, command)


def either(ctx: typer.Context, argument: str | None, option: str | None) -> str | None:
    """The model, of the argument ``MODEL`` and ``--model``; the argument goes before the environment.

    Raises:
        InvalidRequest: both are given.
    """
    if argument is not None and given(ctx, "model"):
        raise InvalidRequest("MODEL and --model: the model is given twice.", hint="Leave out one.")
    return option if argument is None else argument


def given(ctx: typer.Context, *names: str) -> list[str]:
    """Those of the parameters ``names`` that were given on the command line, not by the environment or a default."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def refuse_with_addr(ctx: typer.Context, *names: str) -> None:
    """Refuse options that have no effect with ``--addr``, because the model runs in the worker.

    Raises:
        InvalidRequest: one of the parameters ``names`` was given; the message names it.
    """
    if wrong := given(ctx, *names):
        options = ", ".join("--" + name.replace("_", "-") for name in wrong)
        there = (
            " or `rbee-worker load --addr`" if {"model", *LoadSettings.__dataclass_fields__}.issuperset(wrong) else ""
        )
        raise InvalidRequest(
            f"{options}: no effect with --addr, where the model is the worker's.",
            hint=f"Give it to `rbee-worker serve`{there} instead, or leave --addr out.",
        )


def stdout() -> TextIO:
    """Standard output with UTF-8 and LF, whatever the locale is. If it is closed, output is dropped.

    Text that is not valid Unicode, such as some file names, is written with escapes, which JSON can read.
    """
    if sys.stdout is None:  # closed by the shell, as in `>&-`
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123  (lives as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n", errors="backslashreplace")
    return sys.stdout


def stderr() -> TextIO:
    """Standard error. If it is closed, output is dropped."""
    return sys.stderr if sys.stderr is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
