"""``bench load``: how often it measures and what it prints; a measurement itself is one of the integration tests."""

import json
from pathlib import Path

import pytest

from rbee_worker.cli.bench import load as bench
from tests.tiny import write_tiny_model
from tests.unit.cli.harness import run


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model whose measurements have happened: 1, 2 and so on, of every figure."""
    figures = iter(range(1, 100))

    def measured(*_: object) -> dict[str, object]:
        told = {"dtype": "float32", "kernel": "dense", "cpu_kernels": "none. No compiler.", "storage": "disk"}
        return told | dict.fromkeys(bench.FIGURES, next(figures))

    monkeypatch.setattr(bench, "measure", measured)
    return str(write_tiny_model(tmp_path / "tiny"))


def test_every_run_is_a_line_of_json(model: str) -> None:
    done = run("bench", "load", model, "--runs", "3", "--json")
    assert done.exit_code == 0
    assert [json.loads(line)["ready_seconds"] for line in done.stdout.splitlines()] == [1, 2, 3]


def test_the_table_shows_every_figure_with_its_median_and_range(model: str) -> None:
    done = run("bench", "load", model, "--runs", "3")
    assert done.exit_code == 0
    assert "tiny: float32, dense, from disk; 3 runs" in done.stdout
    assert done.stdout.endswith("CPU kernels: none. No compiler.\n")
    for figure in bench.FIGURES.values():
        assert figure in done.stdout
    assert done.stdout.count("2 (1-3)") == len(bench.FIGURES)
