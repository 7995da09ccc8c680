"""What is said of the CPU kernels, once, to people."""

import pytest

from rbee_worker.errors import DeviceUnavailable
from rbee_worker.kernels import library
from rbee_worker.kernels.library import Kernels
from rbee_worker.runtime.model.linear import cpu


class Chosen(Kernels):
    """Kernels in name alone: what they are called and their number of threads is all that is asked."""

    def __init__(self, threads: int) -> None:
        self.variant, self.threads = "avx2", threads


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (Chosen(1), "avx2, 1 thread"),
        (Chosen(6), "avx2, 6 threads"),
        ("They were not built: no C++ compiler was found.", "none. They were not built: no C++ compiler was found."),
    ],
)
def test_what_runs_or_why_nothing_does(monkeypatch: pytest.MonkeyPatch, chosen: Kernels | str, told: str) -> None:
    monkeypatch.setattr(library, "_choose", lambda: chosen)
    assert cpu.describe_kernels() == told


def test_a_variant_that_is_forced_and_not_there_is_told_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise DeviceUnavailable("RBEE_KERNELS is 'avx512'. This CPU lacks avx512.")

    monkeypatch.setattr(cpu, "cpu_kernels", refuse)
    assert cpu.describe_kernels() == "none. RBEE_KERNELS is 'avx512'. This CPU lacks avx512."
