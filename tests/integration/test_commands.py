"""The installed commands, with their output piped: results on stdout, everything else on stderr, exit codes."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rbee_worker.kernels.choice import expected_variant
from tests.tiny import write_tiny_model

from .conftest import PROGRAM, SECONDS, WITHOUT_AVX512, RawConnection, Served, environment, run, serving, start

QUESTION = "What is the capital of France?"


def test_the_real_model_knows_the_capital_of_france(model_dir: Path) -> None:
    done = run("generate", "--model", str(model_dir), "--prompt", QUESTION, "--temperature", "0", "--max-tokens", "40")
    assert done.returncode == 0
    assert done.stdout == "The capital of France is Paris.\n"
    assert "30/30 layers" in done.stderr
    assert "tok/s" in done.stderr


def test_piped_output_is_the_text_alone_and_quiet_is_quiet(tiny: Path) -> None:
    arguments = ("generate", "--model", str(tiny), "--raw", "--seed", "4", "--max-tokens", "8", "--prompt")
    loud = run(*arguments, "hello")
    quiet = run(*arguments, "hello", "--quiet")
    from_stdin = run(*arguments, "-", stdin="hello\n")
    assert loud.stdout == quiet.stdout == from_stdin.stdout
    assert loud.stdout.endswith("\n")
    assert quiet.stderr == ""


def test_json_lines_are_the_events(tiny: Path) -> None:
    done = run("generate", "--model", str(tiny), "--prompt", "hello", "--json", "--max-tokens", "4", "--seed", "1")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    names = [event.get("stage") or event["event"] for event in events]
    assert names[0] == "resolving"
    assert names[names.index("ready") + 1] == "started"
    assert names[-1] == "end"


def test_load_ends_with_a_report(model_dir: Path) -> None:
    done = run("load", str(model_dir / "model.safetensors"))
    assert done.returncode == 0
    assert done.stdout == ""
    for word in ("resolving", "loading to vram", "warming up", "peak host memory", "memory on cpu", "MB/s"):
        assert word in done.stderr


def test_inspect_and_devices_speak_json(model_dir: Path) -> None:
    done = run("inspect", str(model_dir), "--json")
    facts = json.loads(done.stdout)
    assert (facts["architecture"], facts["layers"], facts["parameters"]) == ("LlamaForCausalLM", 30, 134515008)
    needs = {need["dtype"] for need in facts["memory"]}
    with_kernels = {"int4"} if expected_variant() is not None else set()
    assert needs == {"bfloat16", "float16", "float32", "int8"} | with_kernels
    devices = run("devices", "--json")
    assert "cpu" in devices.stdout
    assert devices.returncode == 0


def test_convert_makes_a_folder_that_says_the_same(gguf_path: Path, model_dir: Path, tmp_path: Path) -> None:
    done = run("convert", str(gguf_path), str(tmp_path / "out"))
    assert done.returncode == 0
    # The same as the other tests' folder, whose text the first test of this file reads.
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", model_dir))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = run("convert", str(gguf_path), str(tmp_path / "out"))
    assert again.returncode == 0
    said = run("generate", "-m", str(gguf_path), "-p", QUESTION, "--temperature", "0", "--dtype", "float32", "-q")
    assert said.stdout == "The capital of France is Paris.\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("load", "no-such-folder/model.safetensors"), 3, "no-such-folder"),
        (("generate", "--prompt", ""), 2, "prompt is empty"),
        (("generate", "--prompt", "x", "--temperature", "7"), 2, "temperature is 7; it must be >= 0 and <= 2"),
        (("generate",), 2, "--prompt"),
        (("load", "--device", "tpu"), 2, "`rbee-worker devices` lists what there is."),
        (("load", "--addr", "127.0.0.1:1"), 6, "127.0.0.1:1"),
        (("load", "--max-context", "999999"), 2, "beyond the model's 8192 positions"),
    ],
)
def test_failures_are_one_message_and_an_exit_code(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("kernels", "env", "message"),
    [
        ("sse", {}, "RBEE_KERNELS is 'sse'; it may be auto, torch, avx2, avx512."),
        ("avx512", WITHOUT_AVX512, "RBEE_KERNELS is 'avx512'. This CPU lacks avx512."),
    ],
)
def test_kernels_that_cannot_be_had_are_a_wrong_usage(
    tiny: Path, kernels: str, env: dict[str, str], message: str
) -> None:
    done = run("load", str(tiny), RBEE_KERNELS=kernels, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {message}\nhint: `rbee-worker devices` lists what there is.\n" in done.stderr
    devices = run("devices", RBEE_KERNELS=kernels, **env)
    assert (devices.returncode, devices.stdout.splitlines()[-1]) == (0, f"CPU kernels: none. {message}")


def interrupted(*arguments: str, when: bytes, stream: str) -> tuple[int, str, str]:
    """Run, send Ctrl-C once ``when`` has been seen on ``stream``; exit code, stdout, stderr."""
    process = start(*arguments)
    source = process.stdout if stream == "stdout" else process.stderr
    assert source is not None
    seen = b""
    while when not in seen:
        data = os.read(source.fileno(), 65536)
        assert data, seen
        seen += data
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    out, err = (seen.decode() + out, err) if stream == "stdout" else (out, seen.decode() + err)
    return process.wait(), out, err


def test_ctrl_c_while_loading_cancels_the_load(gguf_path: Path) -> None:
    code, out, _ = interrupted("load", str(gguf_path), "--json", when=b'"loading_to_vram"', stream="stdout")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 130
    assert events[-1]["stage"] == "cancelled"


def test_ctrl_c_while_generating_keeps_the_text_so_far(tiny: Path) -> None:
    arguments = ("generate", "-m", str(tiny), "-p", "hello", "--raw", "--seed", "1")
    code, out, err = interrupted(*arguments, "--json", when=b'"token"', stream="stdout")
    assert code == 130
    assert '"event":"token"' in out
    assert '"stop_reason":"cancelled"' in out.splitlines()[-1]
    assert "Traceback" not in err


def test_a_reader_that_leaves_ends_it_quietly(tiny: Path) -> None:
    with start("generate", "-m", str(tiny), "-p", "hello", "--raw", "--seed", "1", "-q") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_running_worker_is_driven_from_the_command_line(served: Served, tiny: Path) -> None:
    addr = served.url.removeprefix("http://")
    arguments = ("generate", "--prompt", "hello", "--raw", "--seed", "4", "--max-tokens", "8", "-q")
    assert run(*arguments, "--addr", addr).stdout == run(*arguments, "--model", str(tiny)).stdout
    loaded = run("load", str(tiny), "--addr", addr, "--json")
    assert loaded.returncode == 0
    assert json.loads(loaded.stdout.splitlines()[-1])["stage"] == "ready"
    refused = run("load", "elsewhere", "--addr", addr)
    assert refused.returncode == 1
    assert "--allow-model" in refused.stderr


def test_a_worker_that_is_killed_leaves_the_next_start_clean(gguf_path: Path) -> None:
    with serving("--model", str(gguf_path), wait=False) as worker:
        port = worker.address[1]
        watcher = RawConnection(worker.address, "GET", "/v1/loading/progress")
        watcher.read_until(b'"loading_to_vram"')
        watcher.close()
        worker.process.kill()
        worker.process.wait()
    with serving("--model", str(gguf_path), "--addr", f"127.0.0.1:{port}") as worker:
        assert worker.address[1] == port
        assert worker.stop() == 0


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("generate -m {tiny} -p $'a\\xff'", 2, "not UTF-8"),
        ("load {tiny} --max-context 1", 2, "max-context"),
        ("generate -m {tiny} -p x --raw --max-tokens 2 -q >&-", 0, ""),
    ],
    ids=["odd bytes in a prompt", "a context of one", "stdout closed"],
)
def test_odd_surroundings_are_no_surprise(tiny: Path, script: str, code: int, message: str) -> None:
    command = f"{PROGRAM} {script.format(tiny=tiny)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=SECONDS, env=environment(), check=False)
    assert done.returncode == code, done.stderr
    assert message.encode() in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"unexpected" not in done.stderr


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2> >(exec true)"], ids=["closed", "full", "nobody reads"])
@pytest.mark.parametrize(
    ("arguments", "code", "result"),
    [
        ("load {tiny}", 0, ""),
        ("load {tiny} --json", 0, '"stage":"ready"'),
        ("load {tiny}/nothing", 3, ""),
        ("load {tiny} --log-level debug", 0, ""),
        ("inspect {tiny} --json", 0, '"architecture"'),
        ("generate -m {tiny} -p x --raw --max-tokens 2 --json", 0, '"event":"end"'),
        ("convert {tiny} {out}", 0, ""),
        ("load --no-such-option", 2, ""),
    ],
)
def test_a_command_without_a_stderr_to_write_to_gives_its_result(
    tiny: Path, tmp_path: Path, arguments: str, code: int, *, result: str, stderr: str
) -> None:
    command = f"{PROGRAM} {arguments.format(tiny=tiny, out=tmp_path / 'out')} {stderr}"
    # `sleep`: the reader has left by then.
    script = f"sleep 0.1; {command}" if "true" in stderr else command
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=SECONDS, env=environment(), check=False)
    assert done.returncode == code
    assert result.encode() in done.stdout
    if arguments.startswith("convert"):
        assert (tmp_path / "out" / "model.safetensors").exists()


def test_odd_bytes_in_a_path_are_no_surprise() -> None:
    done = run("load", os.fsdecode(b"no\xffwhere"), "--json")
    assert done.returncode == 3
    assert "no\\udcffwhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr


def test_ctrl_c_in_the_middle_of_a_long_prompt_does_not_wait_for_its_end(tmp_path: Path) -> None:
    # Seconds of work in sixteen steps.
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "max_position_embeddings": 8192}
    model = write_tiny_model(tmp_path / "model", **sizes)
    arguments = ("generate", "-m", str(model), "--raw", "--json", "--dtype", "float32", "-p", "x" * 8000)
    code, out, _ = interrupted(*arguments, when=b'"started"', stream="stdout")
    assert code == 130
    assert '"event":"token"' not in out
    assert '"stop_reason":"cancelled"' in out.splitlines()[-1]
