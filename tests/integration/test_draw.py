"""``draw`` as it is installed: in pipes, on a terminal, beside a worker; what ends it."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from .conftest import CAN_FORK, PROGRAM, Served, environment, run, start
from .test_terminal import ANSI, BAR, OnTerminal

MASKED = re.compile(r"[\d.,]+ s\b|[\d.,]+ MB/s|[\d,]+/[\d,]+ MiB|[\d,.]+ MiB")


def plain(text: str) -> list[str]:
    """Lines without what depends on the moment; those of counts, of which a fast load has few, are left out."""
    return [MASKED.sub("#", line).split() for line in text.splitlines() if "loading to" not in line]


@pytest.fixture(scope="module")
def recorded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = run("load", str(tiny), "--json")
    path = tmp_path_factory.mktemp("recorded") / "load.ndjson"
    path.write_text(done.stdout, "utf-8")
    return path


def test_a_recorded_load_looks_like_the_load(tiny: Path, recorded: Path) -> None:
    real = run("load", str(tiny))
    drawn = run("draw", str(recorded))
    assert (drawn.returncode, drawn.stdout) == (0, "")
    assert plain(drawn.stderr) == plain(real.stderr)
    assert "ready: tiny in" in drawn.stderr


@pytest.mark.skipif(not CAN_FORK, reason="needs os.pidfd_open")
def test_on_a_terminal_there_are_bars_and_the_report(recorded: Path) -> None:
    drawn, code = OnTerminal("draw", str(recorded), "--speed", "1").end()
    shown = ANSI.sub("", drawn)
    assert code == 0
    assert BAR in shown
    assert "3/3 layers" in shown
    assert "Load report" in shown
    assert "\x1b[?25h" in drawn, "the cursor is shown again"


@pytest.mark.skipif(not CAN_FORK, reason="needs os.pidfd_open")
def test_on_a_terminal_without_input_it_says_what_it_wants() -> None:
    drawn, code = OnTerminal("draw").end()
    assert code == 2
    assert "Nothing was piped in" in drawn


def test_a_stream_is_drawn_as_it_comes(served: Served) -> None:
    """The same as ``curl -N … | rbee-worker draw``: curl only copies bytes."""
    process = start("draw")
    assert process.stdin is not None
    body = httpx.get(f"{served.url}/v1/loading/progress").text
    done, _, rest = body.partition("\n\n")
    process.stdin.write(done + "\n\n")
    process.stdin.flush()
    assert process.stderr is not None
    assert "loading to" in process.stderr.readline()
    _, err = process.communicate(rest, timeout=60)
    assert process.returncode == 0
    assert "ready: tiny in" in err


def test_the_text_of_a_job_and_its_newline(served: Served) -> None:
    asked = {"prompt": "hello", "max_tokens": 8, "seed": 1}
    body = httpx.post(f"{served.url}/v1/inference", json=asked).text
    real = run("generate", "--addr", served.url, "--prompt", "hello", "--raw", "--max-tokens", "8", "--seed", "1")
    assert run("draw", stdin=body).stdout == real.stdout


def test_ctrl_c_while_it_waits() -> None:
    process = start("draw")
    assert process.stdin is not None
    process.stdin.write('{"stage":"resolving","model":"m","seq":0,"elapsed_seconds":0}\n')
    process.stdin.flush()
    assert process.stderr is not None
    assert "resolving m" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_ctrl_c_in_a_replay(tmp_path: Path) -> None:
    path = tmp_path / "slow.ndjson"
    events = (
        '{"stage":"resolving","model":"m","seq":0,"elapsed_seconds":0}',
        '{"stage":"warming_up","seq":1,"elapsed_seconds":1e9}',
    )
    path.write_text("\n".join(events))
    process = start("draw", str(path), "--speed", "0.5")
    assert process.stderr is not None
    assert "resolving m" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGPIPE")
def test_a_reader_of_the_text_that_leaves(tmp_path: Path) -> None:
    token = '{"event":"token","t":"' + "x" * 1000 + '","i":0}\n'
    path = tmp_path / "job.ndjson"
    path.write_text(token * 5000)
    process = subprocess.Popen(
        [PROGRAM, "draw", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_it_needs_neither_torch_nor_http(recorded: Path) -> None:
    code = (
        "import sys\nfrom rbee_worker.cli import main\n"
        f"sys.argv = ['rbee-worker', 'draw', {str(recorded)!r}, '--quiet']\n"
        "try:\n    main()\nfinally:\n"
        "    print([m for m in ('torch', 'numpy', 'httpx', 'starlette') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_a_recording_of_one_second_takes_one(tmp_path: Path) -> None:
    path = tmp_path / "second.ndjson"
    line = '{"stage":"resolving","model":"m","seq":%d,"elapsed_seconds":%d}\n'
    path.write_text(line % (0, 0) + line % (1, 2))
    begun = time.monotonic()
    assert run("draw", str(path), "--speed", "2").returncode == 6
    assert time.monotonic() - begun >= 1.0
