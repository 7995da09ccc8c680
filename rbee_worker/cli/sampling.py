"""Makes the options for sampling parameters from their ``Param`` in ``rbee_worker.config``."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from rbee_worker.cli.options import SAMPLING_PANEL, in_place_of
from rbee_worker.config import PARAMS, SamplingParams

T = TypeVar("T")


def sampling_options(command: Callable[..., T]) -> Callable[..., T]:
    """Replace the parameter ``sampling`` of ``command`` by an option for every sampling parameter that may be one.

    ``command`` then gets the values of the options as ``sampling``: keyword arguments of
    :class:`~rbee_worker.config.SamplingParams`, which checks them.
    """
    kinds, defaults = get_type_hints(SamplingParams), SamplingParams()
    options = [_option(name, kinds[name], getattr(defaults, name)) for name, param in PARAMS.items() if param.option]
    return in_place_of("sampling", options, command)


def _option(name: str, kind: Any, default: Any) -> inspect.Parameter:
    """The parameter from which Typer makes the option."""
    param = PARAMS[name]
    texts = kind == tuple[str, ...]
    bounds = f" Range: {param.range}." if param.range is not None else ""
    info = typer.Option(
        "--" + name.replace("_", "-"),
        metavar=None if kind is bool else "TEXT" if texts else "N",
        help=f"{param.option}{bounds}",
        rich_help_panel=SAMPLING_PANEL,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=list(default) if texts else default,
        annotation=Annotated[list[str] if texts else kind, info],
    )
