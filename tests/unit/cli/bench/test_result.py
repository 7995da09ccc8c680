"""What a benchmark found, beside what it found before; and files that hold no such thing."""

import json
from pathlib import Path
from typing import Any

import pytest

from rbee_worker.cli.bench import result as results
from rbee_worker.cli.bench.result import Figure, Result, Spread
from rbee_worker.errors import InvalidRequest
from tests.unit.cli.harness import run

FIGURES = {"fast": Figure("how fast", "tok/s"), "late": Figure("how late", "ms"), "far": Figure("how far", "")}
MACHINE = {"cpu": "Z80", "cores": 1, "system": "CP/M", "python": "3.11"}


def found(*rounds: dict[str, float], **changes: Any) -> Result:
    values: dict[str, Any] = {
        "bench": "decode",
        "machine": MACHINE,
        "model": {"name": "tiny", "dtype": "float32", "kernel": "dense"},
        "settings": {"runs": len(rounds), "tokens": 8},
        "figures": FIGURES,
        "rounds": rounds,
        "left_out": {"far": "too far"},
    }
    return Result(**values | changes)


BEFORE = found({"fast": 10.0, "late": 4.0}, {"fast": 20.0, "late": 2.0}, {"fast": 16.0, "late": 2.0})
NOW = found({"fast": 32.0, "late": 1.0}, {"fast": 40.0, "late": 1.0})


def written(tmp_path: Path, told: object) -> Path:
    path = tmp_path / "before.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return path


def test_a_ratio_is_of_the_medians_and_as_far_as_the_extremes_allow(tmp_path: Path) -> None:
    former = results.read_former(written(tmp_path, BEFORE.to_dict()), "decode")
    assert former.ratios(NOW.spreads) == {"fast": Spread(36 / 16, 32 / 20, 40 / 10), "late": Spread(0.5, 0.25, 0.5)}


def test_the_json_has_the_ratios_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, BEFORE.to_dict())
    results.tell(NOW, results.read_former(path, "decode"), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["compared"] == {
        "file": str(path),
        "ratios": {"fast": {"median": 2.25, "min": 1.6, "max": 4.0}, "late": {"median": 0.5, "min": 0.25, "max": 0.5}},
    }
    assert told | {"compared": None} == NOW.to_dict() | {"compared": None}


def test_the_table_has_the_machine_the_ratios_and_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, BEFORE.to_dict())
    results.tell(NOW, results.read_former(path, "decode"), as_json=False)
    told = capsys.readouterr().out
    assert "tiny: float32, dense; 2 rounds" in told
    assert "Z80, 1 core, CP/M, Python 3.11" in told
    fast = next(line for line in told.splitlines() if "how fast" in line)
    assert fast.split()[-6:-1] == ["36", "(32-40)", "│", "2.25", "(1.6-4)"]
    assert "left out: how far: too far" in told
    assert "another" not in told
    assert "others" not in told


def test_another_machine_and_other_settings_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = found({"fast": 1.0}, machine=MACHINE | {"cores": 8}, settings={"runs": 9, "tokens": 64})
    results.tell(NOW, results.read_former(written(tmp_path, before.to_dict()), "decode"), as_json=False)
    told = capsys.readouterr().out
    assert "the machine was another one: cores 8" in told
    assert "the settings were others: tokens 64" in told
    late = next(line for line in told.splitlines() if "how late" in line)
    assert late.split()[-2] == "-"


def test_nothing_is_compared_with_nothing(tmp_path: Path) -> None:
    before = found({"fast": 0.0, "late": 3.0})
    assert results.read_former(written(tmp_path, before.to_dict()), "decode").ratios(NOW.spreads).keys() == {"late"}


WITHOUT_MAX = BEFORE.to_dict() | {"figures": {"fast": {"unit": "", "median": 1, "min": 1}}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"bench": "decode"}\n{"bench": "decode"}', "not JSON"),
        ({"model": "tiny", "ready_seconds": 1.0}, "no result of a benchmark"),
        (BEFORE.to_dict() | {"bench": "serve"}, "a result of bench serve, not of bench decode"),
        (BEFORE.to_dict() | {"machine": None}, "machine is missing"),
        (BEFORE.to_dict() | {"figures": [1]}, "figures is missing"),
        (WITHOUT_MAX, "figure 'fast' has no median, min and max"),
        (json.dumps(BEFORE.to_dict()).replace("4.0", "NaN"), "NaN"),
        (json.dumps(BEFORE.to_dict()).replace("4.0", "1e999"), "figure 'late' has no median"),
        (json.dumps(BEFORE.to_dict()).replace("4.0", "-4.0"), "figure 'late' has no median"),
        (json.dumps(BEFORE.to_dict()).replace("4.0", "true"), "figure 'late' has no median"),
        ('{"bench": "' + "x" * results.MAX_FILE_BYTES + '"}', "larger than"),
    ],
)
def test_a_file_that_is_no_result_is_refused_before_anything_is_loaded(
    tmp_path: Path, content: object, said: str
) -> None:
    path = written(tmp_path, content)
    done = run("bench", "decode", "-m", str(tmp_path / "no model"), "--compare", str(path))
    assert done.exit_code == 2
    assert done.stdout == ""
    message, hint = done.stderr.splitlines()
    assert str(path) in message
    assert said in message
    assert "rbee-worker bench decode --json" in hint


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="Is a directory"):
        results.read_former(tmp_path, "serve")
