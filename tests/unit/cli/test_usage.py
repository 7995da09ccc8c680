"""The program itself: version, help, options, usage errors."""

import json
import re
import runpy
import subprocess
import sys

import pytest

from rbee_worker import __version__
from rbee_worker.runtime.model.linear.cpu import describe_kernels
from tests.unit.cli.harness import ROOT, Script, run


def test_version_and_help_import_nothing_heavy():
    heavy = ["torch", "numpy", "starlette", "uvicorn", "httpx", "transformers", "pydantic"]
    for option in ("--version", "--help"):
        program = (
            f"import sys\nsys.argv = ['rbee-worker', {option!r}]\nfrom rbee_worker.cli import main\n"
            f"try:\n    main()\nfinally:\n    print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stderr == "[]\n"
        assert done.stdout.startswith(f"rbee-worker {__version__}\n") == (option == "--version")


@pytest.mark.parametrize(
    "command",
    ["load", "generate", "serve", "draw", "inspect", "convert", "devices", "bench load", "bench decode", "bench serve"],
)
def test_help_has_a_purpose_and_an_example(command: str):
    result = run(*command.split(), "--help", env={"TERMINAL_WIDTH": "100"})
    assert result.exit_code == 0
    assert f"Example: rbee-worker {command}" in result.output


def test_options_of_the_contract():
    common = {"--device", "--dtype", "--max-context", "--log-level", "--log-format"}
    output = {"--json", "--quiet"}
    model = {"--model", "-m", "--model-path"}
    remote = {"--addr", "--api-key"}
    sampling = {"--max-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--repetition-penalty"}
    sampling |= {"--presence-penalty", "--frequency-penalty", "--seed", "--stop", "--system", "--raw"}
    server = {"--api-key-file", "--allow-unauthenticated", "--allow-model", "--max-queue", "--max-batch-size"}
    server |= {"--tls-cert", "--tls-key", "--cors-origin", "--trusted-host", "--max-connections"}
    server |= {"--trusted-proxy", "--max-body", "--head-timeout", "--body-timeout", "--idle-timeout", "--send-timeout"}
    server |= {"--prefill-chunk", "--keep-alive", "--shutdown-grace", "--exit-on-load-error", "--no-load"}
    expected = {
        "load": common | output | remote,
        "generate": common | output | remote | model | sampling | {"--prompt"},
        "serve": common | remote | model | server,
    }
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    for command, options in expected.items():
        section = page.split(f"## rbee-worker {command}\n")[1].split("\n## ")[0]
        assert {option for option in options if f"`{option}`" not in section} == set()


@pytest.mark.parametrize(
    "args",
    [
        ["no-such-command"],
        ["load", "--no-such-option"],
        ["load", "m", "extra"],
        ["load", "--dtype", "int3"],
        ["load", "--max-context", "0"],
        ["generate"],
        ["generate", "--prompt", ""],
        ["generate", "--prompt", "x", "--temperature", "2.5"],
        ["generate", "--prompt", "x", "--temperature", "warm"],
        ["generate", "--prompt", "x", "--repetition-penalty", "0"],
        ["generate", "--prompt", "x", "--seed", str(2**64)],
        ["generate", "--prompt", "x", "--stop", ""],
        ["generate", "--prompt", "x", "--raw", "--system", "s"],
        ["generate", "--prompt", "x", "--addr", "::1:80"],
        ["generate", "--prompt", "x", "--addr", "h:1", "--model", "m"],
        ["generate", "--prompt", "x", "--addr", "h:1", "--device", "cpu", "--max-context", "5"],
        ["load", "m", "--addr", "h:1", "--max-context", "5"],
        ["serve", "--addr", "8080"],
        ["serve", "--max-queue", "0"],
        ["serve", "--keep-alive", "-1"],
        ["convert", "m"],
        ["bench", "decode", "--tokens", "0"],
        ["bench", "decode", "--compare", "no-such-file"],
        ["bench", "serve"],
        ["bench", "serve", "--addr", "::1:80"],
        ["bench", "serve", "--addr", "h:1", "--rate", "0"],
        ["bench", "serve", "--addr", "h:1", "--compare", "no-such-file"],
    ],
)
def test_usage_errors_exit_2(engine: Script, args: list[str]):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "rror" in result.stderr  # Typer's panel, or our "error: "
    assert "Traceback" not in result.stderr
    assert engine.models == []


@pytest.mark.parametrize("args", [["--api-key", ""], ["--api-key-file", "no-such-file"]])
def test_keys_that_will_not_do_exit_2(args: list[str]):
    result = run("serve", *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: --api-key")


def test_devices_are_a_table():
    result = run("devices", env={"COLUMNS": "120"})
    assert result.exit_code == 0
    lines = ["".join(char if char.isascii() else " " for char in line) for line in result.stdout.splitlines()]
    head, cpu = (next(line for line in lines if word in line) for word in ("description", "cpu"))
    assert head.split() == ["device", "description", "used", "free", "total"]
    assert cpu.split()[0] == "cpu"
    assert len(re.findall(r"[\d,.]+ [MG]iB", cpu)) == 3
    assert lines[-1] == f"CPU kernels: {describe_kernels()}"


def test_devices_say_the_kernels_in_json_too():
    result = run("devices", "--json")
    kernels = {device["name"]: device.get("cpu_kernels") for device in map(json.loads, result.stdout.splitlines())}
    assert kernels.pop("cpu") == describe_kernels()
    assert set(kernels.values()) <= {None}


def test_python_m(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["rbee_worker", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("rbee_worker", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"rbee-worker {__version__}\n"
