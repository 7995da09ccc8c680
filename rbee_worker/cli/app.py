"""The Typer app: every command, and ``--version``."""

from typing import Annotated

import typer

from rbee_worker import __version__
from rbee_worker.cli import convert, draw, generate, inspect, load, serve
from rbee_worker.cli.bench import decode as bench_decode
from rbee_worker.cli.bench import load as bench_load
from rbee_worker.cli.bench import serve as bench_serve
from rbee_worker.cli.failures import reported

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    # `reported` writes the one message about a failure.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"rbee-worker {__version__}")
        raise typer.Exit


@app.callback()
def root(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Load language models with progress that can be seen, generate text, and serve both over HTTP."""


app.command()(reported(load.load))
app.command()(reported(generate.generate))
app.command()(reported(serve.serve))
app.command()(reported(draw.draw))
app.command()(reported(inspect.inspect))
app.command()(reported(convert.convert))
app.command()(reported(inspect.devices))

benchmarks = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
benchmarks.command("load")(reported(bench_load.load))
benchmarks.command("decode")(reported(bench_decode.decode))
benchmarks.command("serve")(reported(bench_serve.serve))
app.add_typer(benchmarks, name="bench", help="Measure what this machine does.")
