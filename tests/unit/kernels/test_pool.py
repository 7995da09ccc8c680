"""The threads of the kernels: right whoever calls, gone with their kernels, asleep when there is nothing to do."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rbee_worker.kernels.arguments import StoredWeights
from rbee_worker.kernels.formats import FORMATS
from rbee_worker.kernels.library import ABI_VERSION, Kernels, Variant, _path
from tests.unit.kernels.matrices import make_matrix, normal

HANG = 60
"""Seconds after which a test is said to hang."""

TASKS = Path("/proc/self/task")
needs_proc = pytest.mark.skipif(not TASKS.exists(), reason="this system has no /proc/self/task")


def layer(outputs: int = 100, columns: int = 256) -> StoredWeights:
    return StoredWeights([make_matrix(FORMATS[name], outputs, columns, i) for i, name in enumerate(("Q4_0", "F16"))])


def tasks() -> set[str]:
    return {task.name for task in TASKS.iterdir()}


def await_(condition: Callable[[], bool]) -> None:
    """Until it holds: the system does it soon, and says not when."""
    until = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def asleep(task: str) -> bool:
    return (TASKS / task / "stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_any_number_of_threads_may_call_at_once(with_threads: Callable[[int], Kernels]) -> None:
    weights, table = layer(), make_matrix(FORMATS["Q6_K"], 50, 256)
    inputs = [normal(tokens, 256, seed=tokens) for tokens in (1, 2, 5, 17)]
    wanted = torch.arange(49, -1, -1)
    products = [with_threads(1).linear(x, weights) for x in inputs]
    numbers = table.format.decode(table.data)[wanted]
    kernels = with_threads(3)
    start = threading.Barrier(5)

    def multiply(i: int) -> bool:
        start.wait(HANG)
        return all(torch.equal(kernels.linear(inputs[i], weights), products[i]) for _ in range(150))

    def look_up() -> bool:
        start.wait(HANG)
        return all(torch.equal(kernels.rows(StoredWeights([table]), wanted), numbers) for _ in range(150))

    with ThreadPoolExecutor(5) as callers:
        futures = [callers.submit(multiply, i) for i in range(4)] + [callers.submit(look_up)]
        assert [future.result(HANG) for future in futures] == [True] * 5


def test_several_kernels_work_at_once(variant: Variant) -> None:
    weights, x = layer(), normal(9, 256)
    right = Kernels(variant, 1).linear(x, weights)

    def work(threads: int) -> bool:
        kernels = Kernels(variant, threads)
        return all(torch.equal(kernels.linear(x, weights), right) for _ in range(50))

    with ThreadPoolExecutor(3) as callers:
        assert list(callers.map(work, (2, 3, 4), timeout=HANG)) == [True] * 3


def test_there_may_be_fewer_chunks_than_threads(with_threads: Callable[[int], Kernels]) -> None:
    kernels = with_threads(8)
    for outputs in (1, 24, 25, 60):
        weights = layer(outputs)
        for tokens in (1, 4):
            x = normal(tokens, 256, seed=tokens)
            right = with_threads(1).linear(x, weights)
            for _ in range(20):
                assert torch.equal(kernels.linear(x, weights), right)


@needs_proc
def test_threads_end_with_their_kernels(variant: Variant) -> None:
    weights, x = layer(), normal(3, 256)
    before = tasks()
    for use in [False, True] * 5:
        kernels = Kernels(variant, 4)
        assert len(tasks() - before) == 3
        if use:
            kernels.linear(x, weights)
        del kernels
        await_(lambda: not tasks() - before)


@needs_proc
def test_idle_threads_sleep_and_wake(variant: Variant) -> None:
    weights, x, before = layer(400), normal(3, 256), tasks()
    kernels = Kernels(variant, 3)
    mine = tasks() - before
    right = Kernels(variant, 1).linear(x, weights)
    for _ in range(10):
        assert torch.equal(kernels.linear(x, weights), right)
        await_(lambda: all(map(asleep, mine)))
    for pause in (0.0, 0.00005, 0.0001, 0.00015, 0.001) * 100:  # around the moment at which a thread goes to sleep
        time.sleep(pause)
        assert torch.equal(kernels.linear(x, weights), right)


@needs_proc
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns wherever there are threads
def test_a_forked_child_calls_and_ends_without_the_threads(variant: Variant) -> None:
    weights, x, before = layer(400), normal(3, 256), tasks()
    kernels = Kernels(variant, 3)
    right, mine = kernels.linear(x, weights), tasks() - before
    await_(lambda: all(map(asleep, mine)))
    child = os.fork()
    if child == 0:
        try:
            same = torch.equal(kernels.linear(x, weights), right)
            del kernels
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    status: list[int] = []
    try:
        await_(lambda: status.extend(code for found, code in [os.waitpid(child, os.WNOHANG)] if found) or bool(status))
    finally:
        if not status:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert status == [0]
    assert torch.equal(kernels.linear(x, weights), right)


def test_calls_end_where_other_work_takes_a_core(with_threads: Callable[[int], Kernels]) -> None:
    """With more threads than cores, and a process that never rests on one of the cores."""
    kernels, weights, x = with_threads(5), layer(400), normal(3, 256)
    right = with_threads(1).linear(x, weights)
    core = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, [{core}])\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None
            busy.stdout.readline()
            until = time.monotonic() + HANG
            for _ in range(100):
                assert torch.equal(kernels.linear(x, weights), right)
                assert time.monotonic() < until
        finally:
            busy.kill()


@needs_proc
def test_threads_that_cannot_be_had_are_an_error(variant: Variant) -> None:
    """Where the process may take as much memory as the stacks of some threads need, the library makes no context."""
    code = f"""
import ctypes, resource
from pathlib import Path
tasks = lambda: len(list(Path("/proc/self/task").iterdir()))
kernels = ctypes.CDLL({_path(variant)!r})
kernels.rbee_create.restype = ctypes.c_void_p
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (256 << 20),) * 2)
print(kernels.rbee_create(10_000), kernels.rbee_create(2) is not None)
while tasks() > 2: pass
"""
    ended = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False, timeout=HANG
    )
    assert (ended.returncode, ended.stdout) == (0, "None True\n"), ended.stderr


def test_no_context_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library here is a stand-in: it says what the real one does without memory."""
    library = SimpleNamespace(
        rbee_abi_version=lambda: ABI_VERSION,
        **{name: lambda *_: None for name in ("rbee_create", "rbee_destroy", "rbee_linear", "rbee_rows")},
    )
    monkeypatch.setattr("rbee_worker.kernels.library._path", lambda _variant: "")
    monkeypatch.setattr("rbee_worker.kernels.library.ctypes.CDLL", lambda _path: library)
    with pytest.raises(MemoryError, match="7 threads for the kernels"):
        Kernels("avx2", 7)
