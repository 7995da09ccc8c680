"""The limits of a container, memory and processor time, from Linux control groups (versions 1 and 2)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 2**60
"""Version 1 writes "no limit" as a number near the size of the address space. Larger limits than this are none."""


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """A group's limit, and the memory that counts against it, in bytes. Inactive cached file pages do not count."""

    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """Bytes left below the limit."""
        return max(self.limit_bytes - self.used_bytes, 0)


def memory_limit(root: Path = Path("/")) -> CgroupMemory | None:
    """The limit of this process that leaves the least free memory. None: no limit, or no control groups.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    found = [memory for folder in _folders(root, "memory") if (memory := _memory(folder)) is not None]
    return min(found, key=lambda memory: memory.free_bytes, default=None)


def cpu_limit(root: Path = Path("/")) -> int | None:
    """The cores whose time this process may use, by the smallest quota of its groups, rounded up. None: no limit.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    found = [cores for folder in _folders(root, "cpu") if (cores := _cores(folder)) is not None]
    return max(1, math.ceil(min(found))) if found else None


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups and of their ancestors. The limit of each one applies."""
    try:
        text = (root / "proc/self/cgroup").read_text()
    except OSError:
        return
    for line in filter(None, text.splitlines()):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = mount / path.lstrip("/")
        # Inside a container the path may be one of the host, which does not exist. Then the mount itself is the group.
        yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(mount))


def _memory(folder: Path) -> CgroupMemory | None:
    """A group's memory, from the files of version 2 or 1. None: no limit, or no such files."""
    for limit_name, usage_name, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (folder / limit_name).read_text().strip()
            usage = int((folder / usage_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return None
        return CgroupMemory(int(limit), max(usage - int(stat.get(cache_key, 0)), 0))
    return None


def _cores(folder: Path) -> float | None:
    """A group's processor time over real time, from the files of version 2 or 1. None: no limit, or no such files."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            # Version 2 writes "max" for no limit, version 1 writes -1.
            return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None
