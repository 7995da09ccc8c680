from pathlib import Path

import pytest

from rbee_worker.runtime.machine import devices
from rbee_worker.runtime.machine.cgroup import CgroupMemory, memory_limit

MIB = 2**20


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def group(folder: str, limit: object, usage: int, cached: int = 0) -> dict[str, object]:
    """The files of a version 2 group."""
    return {
        f"sys/fs/cgroup{folder}/memory.max": limit,
        f"sys/fs/cgroup{folder}/memory.current": usage,
        f"sys/fs/cgroup{folder}/memory.stat": f"anon 1\ninactive_file {cached}",
    }


def test_the_tightest_of_a_group_and_its_ancestors_counts(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/pod/box"}
    files |= group("/pod/box", "max", 10 * MIB) | group("/pod", 100 * MIB, 30 * MIB, cached=20 * MIB)
    assert memory_limit(write(tmp_path, files)) == CgroupMemory(100 * MIB, 10 * MIB)


def test_a_path_of_the_host_falls_back_on_the_mount(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/kubepods/pod1/abc"} | group("", 64 * MIB, 80 * MIB)
    found = memory_limit(write(tmp_path, files))
    assert found is not None
    assert found.free_bytes == 0


def test_version_one(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory/box/memory"
    files = {
        "proc/self/cgroup": "4:cpu,memory:/box\n0::/",
        f"{base}.limit_in_bytes": 50 * MIB,
        f"{base}.usage_in_bytes": 20 * MIB,
        f"{base}.stat": f"cache 1\ntotal_inactive_file {5 * MIB}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 1,
        "sys/fs/cgroup/memory/memory.stat": "cache 1",
    }
    assert memory_limit(write(tmp_path, files)) == CgroupMemory(50 * MIB, 15 * MIB)


@pytest.mark.parametrize("text", ["", "0::/box", "4:memory:/box"])
def test_no_limit_is_none(tmp_path: Path, text: str) -> None:
    assert memory_limit(write(tmp_path, {"proc/self/cgroup": text} | group("/box", "max", 1))) is None
    assert memory_limit(tmp_path / "nowhere") is None


def test_a_container_s_limit_is_the_host_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = devices.host_info()
    monkeypatch.setattr(devices, "memory_limit", lambda: CgroupMemory(300 * MIB, 100 * MIB))
    limited = devices.host_info()
    assert (limited.total_bytes, limited.free_bytes) == (300 * MIB, 200 * MIB)
    monkeypatch.setattr(devices, "memory_limit", lambda: CgroupMemory(10 * whole.total_bytes, 0))
    assert devices.host_info().total_bytes == whole.total_bytes
