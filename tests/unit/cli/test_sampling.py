"""The options of the sampling parameters: one for each that may be one, with its default, its help and its range."""

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rbee_worker.cli.sampling import sampling_options
from rbee_worker.config import PARAMS, SamplingParams

GIVEN = {
    "max_tokens": ("7", 7),
    "temperature": ("0.5", 0.5),
    "top_p": ("0.9", 0.9),
    "top_k": ("4", 4),
    "min_p": ("0.1", 0.1),
    "repetition_penalty": ("1.2", 1.2),
    "presence_penalty": ("-1", -1.0),
    "frequency_penalty": ("1", 1.0),
    "seed": ("-3", -3),
    "stop": ("a b", ("a b",)),
}


def sampled(*arguments: str) -> SamplingParams:
    taken: list[dict[str, Any]] = []

    @sampling_options
    def command(*, before: str = "", sampling: dict[str, Any], after: str = "") -> None:
        taken.append(sampling)
        assert (before, after) == ("b", "a")

    app = typer.Typer()
    app.command()(command)
    CliRunner().invoke(app, ["--before=b", *arguments, "--after=a"], catch_exceptions=False)
    return SamplingParams(**taken[0])


def test_every_option_is_tried_here():
    assert {name for name, param in PARAMS.items() if param.option} == GIVEN.keys()


def test_without_options_the_defaults_hold():
    assert sampled() == SamplingParams()


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_gives_its_parameter(name: str):
    text, value = GIVEN[name]
    assert sampled(f"--{name.replace('_', '-')}={text}") == SamplingParams(**{name: value})


def test_an_option_may_be_repeated_where_there_may_be_several():
    assert sampled("--stop=a", "--stop=b").stop == ("a", "b")
