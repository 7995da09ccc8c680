"""What is generated from the commands is in the repository as it would be generated now; completing is cheap."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rbee_worker.cli.reference import COMPLETE_VARIABLE, completion_scripts, insert_reference

ROOT = Path(__file__).parents[2]
HELP = "python -m rbee_worker.cli.reference writes it"
HEAVY = ("torch", "numpy", "starlette", "uvicorn", "httpx", "transformers")  # Typer itself imports pydantic


def test_scripts_are_up_to_date():
    for name, script in completion_scripts().items():
        assert (ROOT / "completions" / name).read_text("utf-8") == script, HELP


def test_reference_is_up_to_date():
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert insert_reference(page) == page, HELP


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="marks"):
        insert_reference("# nothing here")


@pytest.mark.parametrize(
    "env",
    [
        {"COLUMNS": "40", "TERM": "dumb", "NO_COLOR": "1", "LC_ALL": "C"},
        {"COLUMNS": "300", "FORCE_COLOR": "1", "TERMINAL_WIDTH": "30", "RBEE_MODEL": "x", "RBEE_API_KEY": "k"},
    ],
)
def test_what_is_generated_depends_on_nothing_around_it(env: dict[str, str], tmp_path: Path):
    (tmp_path / "docs").mkdir()
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    (tmp_path / "docs" / "cli.md").write_text(page, "utf-8")
    command = [sys.executable, "-m", "rbee_worker.cli.reference", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, check=True, timeout=60)
    assert (tmp_path / "docs" / "cli.md").read_text("utf-8") == page
    for name, script in completion_scripts().items():
        assert (tmp_path / "completions" / name).read_text("utf-8") == script


def complete(*words: str) -> list[str]:
    """What bash would offer for the last of ``words``; fails if anything heavy was imported for it."""
    program = (
        "import sys\nfrom rbee_worker.cli import main\n"
        "try:\n    main()\n"
        f"finally:\n    print(*[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    env = {
        **os.environ,
        COMPLETE_VARIABLE: "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, check=True, timeout=60, capture_output=True, text=True
    )
    assert result.stderr.split() == []
    return result.stdout.split()


def test_commands_complete():
    assert complete("rbee-worker", "") == [
        "load",
        "generate",
        "serve",
        "draw",
        "inspect",
        "convert",
        "devices",
        "bench",
    ]
    assert complete("rbee-worker", "bench", "") == ["load", "decode", "serve"]
    assert complete("rbee-worker", "gen") == ["generate"]


def test_options_complete():
    assert complete("rbee-worker", "generate", "--repe") == ["--repetition-penalty"]


def test_values_complete():
    assert complete("rbee-worker", "load", "--dtype", "bf") == ["bfloat16"]
    assert complete("rbee-worker", "load", "--device", "cu") == ["cuda", "cuda:0"]
    assert complete("rbee-worker", "serve", "--log-format", "") == ["text", "json"]


def test_the_bash_script_completes_in_bash(tmp_path: Path):
    program = tmp_path / "rbee-worker"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rbee_worker.cli "$@"\n')
    program.chmod(0o755)
    script = (
        f'source "{ROOT}/completions/rbee-worker.bash"; COMP_WORDS=(rbee-worker insp); COMP_CWORD=1; '
        '_rbee_worker_completion rbee-worker; echo "${COMPREPLY[@]}"; complete -p rbee-worker'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=env, check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "inspect"
    assert "_rbee_worker_completion rbee-worker" in done.stdout
