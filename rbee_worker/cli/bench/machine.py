"""The machine that a benchmark ran on: what it is, and how fast it reads memory."""

import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

READ_BYTES = 2**30
"""Of memory that one pass reads: far more than a processor's caches hold."""
_FREE_SHARE = 4
_PASSES = 3


def machine() -> dict[str, str | int]:
    """The processor, the cores that this process may use, the system and Python."""
    import psutil  # noqa: PLC0415

    process = psutil.Process()
    allowed = len(process.cpu_affinity() or ()) if hasattr(process, "cpu_affinity") else 0
    return {
        "cpu": _cpu(),
        "cores": allowed or psutil.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def torch_machine() -> dict[str, str | int]:
    """The same, with torch: its version, threads and instructions; and the CPU kernels, or why there are none."""
    import torch  # noqa: PLC0415

    from rbee_worker.runtime.model.linear.cpu import describe_kernels  # noqa: PLC0415

    return machine() | {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpu_kernels": describe_kernels(),
    }


def describe(facts: Mapping[str, object]) -> str:
    """One line about a machine."""
    words = [f"{facts['cpu']}", _count(facts["cores"], "core")]
    if "torch" in facts:
        words += [_count(facts["threads"], "torch thread"), f"{facts['instructions']}", f"torch {facts['torch']}"]
    return ", ".join([*words, f"{facts['system']}", f"Python {facts['python']}"])


class ReadRate:
    """Memory that is read from first to last, to learn how fast this machine can.

    It is written once when it is made, so that its pages exist. It is far larger than the caches, so that nothing of it
    is in them when a pass begins. torch adds its float32 numbers up with all its threads. A sum in the cache is several
    times as fast as memory, so arithmetic is not the limit.
    """

    def __init__(self, device: "torch.device") -> None:
        import torch  # noqa: PLC0415

        from rbee_worker.runtime.machine.devices import device_info  # noqa: PLC0415

        size = min(READ_BYTES, device_info(device).free_bytes // _FREE_SHARE)
        self._memory = torch.ones(size // 4, dtype=torch.float32, device=device)

    def measure(self) -> float:
        """GB/s of the fastest of three passes."""
        return max(self._pass() for _ in range(_PASSES))

    def _pass(self) -> float:
        began = time.perf_counter()
        self._memory.sum().item()  # the number is asked for: a GPU has then finished
        return self._memory.nbytes / (time.perf_counter() - began) / 1e9


def _count(number: object, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _cpu() -> str:
    if sys.platform == "linux":
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
        for line in text.splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
