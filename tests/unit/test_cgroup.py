from pathlib import Path

import pytest
import torch

from rbee_worker.cgroup import CgroupMemory, cpu_limit, memory_limit
from rbee_worker.runtime.machine import devices
from tests.engines import loaded
from tests.tiny import write_tiny_model

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


@pytest.mark.parametrize(
    ("pod", "box", "cores"),
    [
        ("400000 100000", "max 100000", 4),
        ("400000 100000", "150000 100000", 2),  # one core and a half: a second thread has use for the half
        ("200000 100000", "800000 100000", 2),
        ("max 100000", "5000 100000", 1),
        ("max 100000", "max 100000", None),
        ("max 100000", "out of order", None),
    ],
)
def test_the_smallest_quota_of_a_group_and_its_ancestors_counts(
    tmp_path: Path, pod: str, box: str, cores: int | None
) -> None:
    base = "sys/fs/cgroup/pod"
    files = {"proc/self/cgroup": "0::/pod/box", f"{base}/cpu.max": pod, f"{base}/box/cpu.max": box}
    assert cpu_limit(write(tmp_path, files)) == cores
    assert cpu_limit(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("quota", "cores"), [(-1, 4), (0, 4), (250_000, 3), (900_000, 4)])
def test_a_quota_of_version_one(tmp_path: Path, quota: int, cores: int) -> None:
    base = "sys/fs/cgroup/cpu"
    files = {
        "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/pod/box\n0::/",
        f"{base}/pod/box/cpu.cfs_quota_us": quota,
        f"{base}/pod/box/cpu.cfs_period_us": 100_000,
        f"{base}/pod/cpu.cfs_quota_us": 200_000,
        f"{base}/pod/cpu.cfs_period_us": 50_000,
        f"{base}/cpu.cfs_quota_us": -1,
        f"{base}/cpu.cfs_period_us": 100_000,
    }
    assert cpu_limit(write(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("told", "threads"), [(None, 2), ("", 2), ("3", 4)], ids=["quota", "an empty word", "a user's word"]
)
def test_torch_keeps_to_a_container_s_quota_unless_a_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, told: str | None, threads: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(devices, "cpu_limit", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    try:
        torch.set_num_threads(4)
        devices.limit_threads()
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        devices.limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_load_keeps_to_the_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(devices, "cpu_limit", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(2)
        loaded(write_tiny_model(tmp_path / "m"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_container_s_limit_is_the_host_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = devices.host_info()
    monkeypatch.setattr(devices, "memory_limit", lambda: CgroupMemory(300 * MIB, 100 * MIB))
    limited = devices.host_info()
    assert (limited.total_bytes, limited.free_bytes) == (300 * MIB, 200 * MIB)
    monkeypatch.setattr(devices, "memory_limit", lambda: CgroupMemory(10 * whole.total_bytes, 0))
    assert devices.host_info().total_bytes == whole.total_bytes
