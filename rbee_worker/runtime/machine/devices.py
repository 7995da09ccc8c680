"""The devices of this machine and their memory."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from rbee_worker.cgroup import cpu_limit, memory_limit
from rbee_worker.errors import DeviceUnavailable

if TYPE_CHECKING:
    import torch

MIB = 2**20


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device and its memory in bytes; ``used`` counts every process."""

    name: str
    description: str
    total_bytes: int
    used_bytes: int
    free_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; the keys are the names of the fields."""
        return asdict(self)


def list_devices() -> list[DeviceInfo]:
    """All devices of this machine that a model can run on. Imports torch."""
    import torch  # noqa: PLC0415  (costs seconds; only some callers need it)

    devices = [_cuda_info(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(_host_info("mps", "Apple GPU (shares the host's memory)"))
    return [*devices, host_info()]


def host_info() -> DeviceInfo:
    """The CPU and the host's memory, within the limit of a container."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return _host_info("cpu", f"CPU, {cores} core{'s' if cores > 1 else ''}")


def device_info(device: torch.device) -> DeviceInfo:
    """A device and its memory."""
    if device.type == "cuda":
        return _cuda_info(device.index or 0)
    return _host_info("mps", "Apple GPU") if device.type == "mps" else host_info()


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` means on this machine. Imports torch.

    Raises:
        DeviceUnavailable: this machine has no such device, or ``name`` is none of these.
    """
    import torch  # noqa: PLC0415

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, index = name.partition(":")
    count = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}.get(kind)
    known = count is not None and (not index or (kind == "cuda" and index.isdecimal()))
    if not known:
        raise DeviceUnavailable(f"'{name}' names no device.", hint="Use auto, cpu, cuda, cuda:N or mps.")
    if not count or int(index or 0) >= count:
        found = f"{count} CUDA device{'' if count == 1 else 's'}" if kind == "cuda" else "no such device"
        raise DeviceUnavailable(
            f"Device {name} is not available: {found} found.", hint="Use one that is here, or auto."
        )
    return torch.device("cuda", int(index or 0)) if kind == "cuda" else torch.device(kind)


def limit_threads() -> None:
    """Let torch use no more threads than a container has cores' time for. Imports torch.

    torch counts the cores of the machine. With more threads than its quota, a container is stopped for a part of every
    period, and every operator waits for it. ``OMP_NUM_THREADS`` is a user's word, and stays.
    """
    import torch  # noqa: PLC0415

    cores = cpu_limit()
    if cores is not None and cores < torch.get_num_threads() and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(cores)


def peak_host_bytes() -> int:
    """The highest resident memory that this process had so far, in bytes, as the operating system counts it."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # getrusage would give the parent's peak where that was larger: the figure survives exec.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource  # noqa: PLC0415  (not on Windows)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trim_host_memory() -> None:
    """Give memory that was freed, but that malloc keeps, back to the operating system. Works only with glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _cuda_info(index: int) -> DeviceInfo:
    import torch  # noqa: PLC0415

    free, total = torch.cuda.mem_get_info(index)
    return DeviceInfo(f"cuda:{index}", torch.cuda.get_device_name(index), total, total - free, free)


def _host_info(name: str, description: str) -> DeviceInfo:
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    # In a container this process cannot use all of the host's memory.
    group = memory_limit()
    if group is not None:
        total, free = min(total, group.limit_bytes), min(free, group.free_bytes)
    return DeviceInfo(name, description, total, total - free, free)
