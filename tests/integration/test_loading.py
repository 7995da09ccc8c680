"""Loads that are measured, cancelled, stuck, or of files that cannot be read: each in a process of its own."""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny import write_tiny_model

from .conftest import run, run_code

NOBODY = 65534
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The tiny model in two shards."""
    path = write_tiny_model(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def failure_of(path: Path) -> str:
    """What the user is told: the one message, the same as in the event."""
    done = run("load", str(path), "--json")
    assert done.returncode == 3, done.stderr
    event = json.loads(done.stdout.splitlines()[-1])
    message, *_ = done.stderr.splitlines()
    assert (event["stage"], event["code"]) == ("error", "MODEL_MALFORMED")
    assert event["message"].startswith(message.removeprefix("error: "))
    return message


def test_shards_load_as_one_file_does(sharded: Path) -> None:
    done = run("load", str(sharded), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["stage"] == "ready"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    message = failure_of(sharded)
    assert "model-00002-of-00002.safetensors" in message
    assert "missing" in message


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    message = failure_of(sharded)
    assert "model-00001-of-00002.safetensors" in message
    assert "model.norm.weight" in message


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_a_file_without_read_permission_is_named() -> None:
    # Outside of pytest's folders, which are closed to others: as root, the load runs as someone who may not read.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        assert_named(write_tiny_model(Path(folder) / "model"))


def assert_named(path: Path) -> None:
    (path / "model.safetensors").chmod(0)
    if os.geteuid() != 0:
        assert "Permission denied" in failure_of(path)
        return
    path.chmod(0o755)
    program = (
        "import sys, os\n"
        "from rbee_worker.runtime.engine.engine import Engine\n"  # read as root: the installation may be root's alone
        "from rbee_worker.errors import RbeeError\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "try:\n    [None for _ in Engine().load(sys.argv[1])]\n"
        "except RbeeError as error:\n    print(error.code, error)\n"
    )
    done = run_code(program, str(path))
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "Permission denied" in done.stdout


MEMORY = """
import sys, threading, time
import torch
from pathlib import Path
from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig
from rbee_worker.events import LoadCancelled, LoadingToVram
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.machine.devices import trim_host_memory

def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) // 1024

def cancelled(dtype):
    cancel = Cancellation()
    for event in Engine(EngineConfig(dtype=dtype)).load(sys.argv[1], cancel):
        if isinstance(event, LoadingToVram) and event.layers_loaded >= 3:
            most = resident()
            cancel.set()
    assert isinstance(event, LoadCancelled), event
    return most

for dtype in sys.argv[2:]:
    cancelled(dtype)  # what libraries set up on first use stays
    before, threads = resident(), threading.active_count()
    files = len(list(Path("/proc/self/fd").iterdir()))
    most = max(cancelled(dtype) for _ in range(4))
    deadline = time.monotonic() + 50  # a thread that was in a read for too long is not waited for
    while time.monotonic() < deadline and threading.active_count() > threads:
        time.sleep(0.01)
    trim_host_memory()  # such a thread frees its part after the load was over: malloc may keep that
    print(before, most, resident())
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == files
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_cancelled_loads_leave_nothing_behind(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 8192}
    path = write_tiny_model(tmp_path / "model", **sizes)
    done = run_code(MEMORY, str(path), "float32", "float16", timeout=250)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        before, most, after = map(int, line.split())
        assert most > before + 60, "the model is too small to tell"
        # Four loads that leave a layer each leave half of a load. malloc may keep the end of a thread's heap.
        assert after < before + (most - before) // 4


STUCK = """
import os, sys, threading
from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig
from rbee_worker.events import LoadCancelled, Stalled
from rbee_worker.runtime.loading import reader
from rbee_worker.runtime.engine.engine import Engine

never, _ = os.pipe()

class Dead:
    def __init__(self, path):
        self._file = path.open("rb", buffering=0)
        self.fileno, self.seek, self.close = self._file.fileno, self._file.seek, self._file.close
    def readinto(self, buffer):
        return os.readv(never, [buffer])

reader.open_raw = Dead
cancel = Cancellation()
for event in Engine(EngineConfig(stall_seconds=0.2)).load(sys.argv[1], cancel):
    if isinstance(event, Stalled):
        cancel.set()
assert isinstance(event, LoadCancelled)
assert [thread for thread in threading.enumerate() if thread.name.startswith("weight-reader")]
print("cancelled")
"""


def test_a_process_ends_though_a_read_never_returns(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model")
    done = run_code(STUCK, str(path))
    assert (done.returncode, done.stdout) == (0, "cancelled\n"), done.stderr


def test_the_benchmark_of_loading(gguf_path: Path) -> None:
    done = run("bench", "load", str(gguf_path), "--runs", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ready_seconds"] > result["read_seconds"] > 0
    assert result["peak_host_mib"] > result["resident_mib"] > 80  # the file has 92 MiB
    assert result["events_percent"] < 1


def test_a_benchmark_of_a_model_that_does_not_load_says_why(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model")
    (path / "tokenizer.json").write_text("{}")
    done = run("bench", "load", str(path))
    assert done.returncode == 3
    assert "tokenizer.json" in done.stderr
    assert "Traceback" not in done.stderr
