"""``load`` and ``generate`` in this process. The engine is a stand-in with the same protocol."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbee_worker.cancellation import Cancellation
from rbee_worker.cli.failures import interrupts
from rbee_worker.config import EngineConfig
from rbee_worker.errors import (
    InferenceError,
    ModelMalformed,
    ModelNotFound,
    ModelUnsupported,
    OutOfMemory,
    RbeeError,
    Remedy,
)
from rbee_worker.events import Event, InferenceFailed, LoadCancelled, LoadFailed, LoadingEvent, Token, to_json
from tests.unit.cli.harness import ROOT, Script, run
from tests.unit.samples import JOB, LOAD, TEXT, layers


def test_load_draws_and_reports(engine: Script):
    result = run(
        "load", "m.gguf", "--device", "cpu", "--dtype", "float32", "--quantize", "int8", "--mmap", "--max-context", "64"
    )
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "30/30 layers" in result.stderr
    assert "peak host memory" in result.stderr
    assert engine.models == ["m.gguf"]
    assert engine.configs == [EngineConfig(device="cpu", dtype="float32", quantize="int8", mmap=True, max_context=64)]
    assert engine.closed == ["load"]


def test_defaults_are_those_of_config(engine: Script):
    assert run("load").exit_code == 0
    assert engine.configs == [EngineConfig()]
    assert engine.models == [None]


def test_model_from_the_environment(engine: Script):
    run("load", env={"RBEE_MODEL": "env.gguf"})
    run("generate", "-p", "x", env={"RBEE_MODEL": "env.gguf"})
    run("generate", "-p", "x", "--model-path", "arg.gguf", env={"RBEE_MODEL": "env.gguf"})
    assert engine.models == ["env.gguf", "env.gguf", "arg.gguf"]


@pytest.mark.usefixtures("engine")
def test_json_is_the_events():
    result = run("load", "--json")
    assert result.stdout == "".join(to_json(event) + "\n" for event in LOAD)
    assert result.stderr == ""


@pytest.mark.usefixtures("engine")
def test_quiet_is_quiet():
    result = run("load", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize(
    ("error", "code", "hint"),
    [
        (ModelNotFound("m: no such file.", hint="Check the path."), 3, "Check the path."),
        (ModelMalformed("m: damaged."), 3, ""),
        (ModelUnsupported("m: Mamba."), 4, ""),
        (OutOfMemory("m: too big.", remedies=[Remedy({"dtype": "float16"})]), 5, "Use --dtype float16."),
    ],
)
def test_a_failed_load_is_one_message_and_its_code(engine: Script, error: RbeeError, code: int, hint: str):
    failed = LoadFailed(code=error.code, message=error.message, seq=1, elapsed_seconds=0.1)

    def loading(_: Cancellation) -> Iterator[LoadingEvent]:
        yield LOAD[0]  # type: ignore[misc]
        yield failed
        raise error

    engine.loading = loading
    result = run("load", "m", "--quiet")
    assert result.exit_code == code
    assert result.output == f"error: {error.message}\n" + (f"hint: {hint}\n" if hint else "")
    result = run("load", "m", "--json")
    assert result.exit_code == code
    assert result.stdout.splitlines()[-1] == to_json(failed)
    assert result.stderr.startswith("error: ")
    # Bars name the failure's code; the message itself is said once.
    assert run("load", "m").stderr.count(error.message) == 1


def test_remedies_are_options(engine: Script):
    remedies = [Remedy({"device": "cpu", "max_context": 512}, 1024), Remedy({"kv_cache_memory": "2MiB"}, 3)]

    def loading(_: Cancellation) -> Iterator[LoadingEvent]:
        raise OutOfMemory("m: too big.", remedies=remedies)
        yield

    engine.loading = loading
    assert run("load", "--quiet").stderr.splitlines() == [
        "error: m: too big.",
        "hint: What would fit: --device cpu --max-context 512 (1,024 MiB); --kv-cache-memory 2MiB (3 MiB).",
    ]


def test_where_no_setting_helps_the_command_that_shows_free_memory_is_named(engine: Script):
    def loading(_: Cancellation) -> Iterator[LoadingEvent]:
        raise OutOfMemory("Memory ran out.", hint="Something else may have taken it.")
        yield

    engine.loading = loading
    assert run("load", "--quiet").stderr.splitlines() == [
        "error: Memory ran out.",
        "hint: Something else may have taken it. `rbee-worker devices` shows what is free.",
    ]


def test_the_unexpected_is_one_line_unless_debug(engine: Script):
    def loading(_: Cancellation) -> Iterator[LoadingEvent]:
        raise ZeroDivisionError("division\nby zero")
        yield

    engine.loading = loading
    result = run("load", "--quiet")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == "error: unexpected ZeroDivisionError: division by zero"
    assert "--log-level debug" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run("load", "--quiet", "--log-level", "debug").stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_cancels_the_load_and_draws_it(engine: Script, signum: signal.Signals, code: int):
    def loading(cancel: Cancellation) -> Iterator[LoadingEvent]:
        yield layers(0, 1)
        os.kill(os.getpid(), signum)
        yield layers(1, 2)
        assert cancel.is_set()
        yield LoadCancelled(vram_mb_freed=20, seq=2, elapsed_seconds=0.2)

    engine.loading = loading
    result = run("load")
    assert result.exit_code == code
    assert "cancelled, 20 MiB freed" in result.stderr
    assert "Traceback" not in result.stderr
    assert engine.closed == ["load"]


def test_the_second_signal_does_not_wait(engine: Script):
    def loading(_: Cancellation) -> Iterator[LoadingEvent]:
        yield layers(0, 1)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield LoadCancelled(vram_mb_freed=20, seq=2, elapsed_seconds=0.2)

    engine.loading = loading
    result = run("load")
    assert result.exit_code == 130
    assert "freed" not in result.stderr
    assert engine.closed == ["load"]


def test_a_signal_after_the_last_event_counts(engine: Script):
    def loading(_: Cancellation) -> Iterator[LoadingEvent]:
        yield from LOAD  # type: ignore[misc]
        os.kill(os.getpid(), signal.SIGINT)

    engine.loading = loading
    assert run("generate", "-p", "x").exit_code == 130
    assert engine.requests == []


def test_handlers_are_given_back():
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with interrupts(), interrupts(threading.Event().set):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts() as received:
            os.kill(os.getpid(), signal.SIGINT)
            received.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_text_alone_on_stdout(engine: Script):
    result = run("generate", "--prompt", "hi", "--max-tokens", "2", "--seed", "7", "--stop", "a", "--stop", "b")
    assert result.exit_code == 0
    assert result.stdout == TEXT
    assert "10.0 tok/s" in result.stderr
    request = engine.requests[0]
    assert (request.prompt, request.raw) == ("hi", False)
    assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.stop) == (2, 7, ("a", "b"))
    assert engine.closed == ["load", "generate"]


@pytest.mark.usefixtures("engine")
def test_generate_json_is_every_event_in_order():
    result = run("generate", "--prompt", "hi", "--json")
    assert result.stdout == "".join(to_json(event) + "\n" for event in LOAD + JOB)
    assert result.stderr == ""


@pytest.mark.parametrize("text", ["a\nb", "a\nb\n", "a\nb\r\n"])
def test_prompt_from_stdin_less_one_newline(engine: Script, text: str):
    assert run("generate", "--prompt", "-", stdin=text).stdout == TEXT
    assert engine.requests[0].prompt == "a\nb"


@pytest.mark.parametrize("stdin", [b"", b"\n", b"\xff"])
def test_no_prompt_on_stdin(engine: Script, stdin: bytes):
    assert run("generate", "--prompt", "-", stdin=stdin).exit_code == 2
    assert engine.models == []


def test_system_text_makes_messages(engine: Script):
    run("generate", "-p", "hi", "--system", "be brief")
    assert [message["role"] for message in engine.requests[0].messages or ()] == ["system", "user"]


def test_a_job_that_fails_is_an_error_after_its_text(engine: Script):
    engine.generating = lambda: iter([*JOB[:2], InferenceFailed(code="INFERENCE_FAILED", message="Sampling failed.")])
    result = run("generate", "--prompt", "hi", "--quiet")
    assert (result.exit_code, result.stdout) == (InferenceError.exit_code, f"{JOB[1].t}\n")
    assert result.stderr == "error: Sampling failed.\n"


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), ("2GB", 2 * 10**9), ("1k", 1024)]
)
def test_sizes(engine: Script, text: str, size: int):
    assert run("load", "m", "--kv-cache-memory", text).exit_code == 0
    assert engine.configs == [EngineConfig(kv_cache_memory=size)]


@pytest.mark.parametrize(
    ("text", "message"),
    [("much", "is no size"), ("-1GiB", "is no size"), ("0", "must be positive"), ("1TBs", "no size")],
)
def test_what_is_no_size(engine: Script, text: str, message: str):
    result = run("load", "m", "--kv-cache-memory", text)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert engine.models == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_the_text_so_far(engine: Script, signum: signal.Signals, code: int):
    def generating() -> Iterator[Event]:
        yield from JOB[:2]
        os.kill(os.getpid(), signum)
        yield Token(t="!", i=1)
        assert engine.cancelled.is_set()
        yield JOB[-1]

    engine.generating = generating
    result = run("generate", "--prompt", "hi", "--quiet")
    assert result.exit_code == code
    assert result.stdout == JOB[1].t + "!\n"
    assert result.stderr == ""
    assert engine.closed == ["load", "generate"]


def test_a_reader_that_leaves_is_no_error(tmp_path: Path):
    # A stand-in engine again, in a process of its own, as a real pipe is needed.
    program = tmp_path / "main.py"
    program.write_text(
        "import sys\n"
        "from types import ModuleType\n"
        "from rbee_worker.events import Token\n"
        "class Engine:\n"
        "    def __init__(self, config): pass\n"
        "    def load(self, model, cancel): return iter(())\n"
        "    def cancel(self, job_id): pass\n"
        "    def generate(self, request): return (Token(t='word ' * 999, i=i) for i in range(10**6))\n"
        "module = sys.modules['rbee_worker.runtime.engine.engine'] = ModuleType('rbee_worker.runtime.engine.engine')\n"
        "module.Engine = Engine\n"
        "from rbee_worker.cli import main\n"
        "main()\n"
    )
    script = f'"{sys.executable}" "{program}" generate --prompt x | head -c 4; echo " ${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "word 141\n"
    assert done.stderr == ""
