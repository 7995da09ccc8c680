import psutil
import pytest
import torch

from rbee_worker.errors import DeviceUnavailable
from rbee_worker.runtime.machine import devices
from rbee_worker.runtime.machine.devices import host_info, list_devices, peak_host_bytes, resolve_device

CPU = torch.device("cpu")


def test_the_host_is_a_device_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "memory_limit", lambda: None)
    host = host_info()
    assert host.total_bytes == psutil.virtual_memory().total
    assert host.used_bytes + host.free_bytes == host.total_bytes
    assert [device.name for device in list_devices()][-1] == "cpu"


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpu:1", "", "cuda:99", "cuda:-1"])
def test_other_devices_are_refused_by_name(name: str) -> None:
    with pytest.raises(DeviceUnavailable, match=r"(names no device|is not available: .* found)\. Use "):
        resolve_device(name)


def test_auto_finds_a_device() -> None:
    assert resolve_device("auto").type in {"cuda", "mps", "cpu"}
    assert resolve_device("cpu") == CPU


def test_the_peak_is_this_process_own() -> None:
    assert psutil.Process().memory_info().rss <= peak_host_bytes() < host_info().total_bytes
