"""What is told without torch is what the library chooses with it."""

from pathlib import Path

import pytest

from rbee_worker.errors import DeviceUnavailable
from rbee_worker.kernels import choice, library
from rbee_worker.kernels.formats import FORMATS

ALL = {flag for flags in choice._FLAGS.values() for flag in flags}


def cpu(root: Path, *flags: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {' '.join(flags)} sse\n\nprocessor\t: 1\n")
    return root


@pytest.mark.parametrize("asked", [None, "", "auto", "avx2", "avx512", "torch", "nonsense"])
@pytest.mark.parametrize("hidden", [None, "avx2", "avx512", "default"])
def test_it_is_the_library_s_choice(monkeypatch: pytest.MonkeyPatch, asked: str | None, hidden: str | None) -> None:
    for name, value in (("RBEE_KERNELS", asked), ("ATEN_CPU_CAPABILITY", hidden)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if hidden in ("avx2", "default"):  # torch reads it when it starts
        monkeypatch.setattr(library.torch.backends.cpu, "get_cpu_capability", lambda: str(hidden).upper())
    try:
        chosen = library._choose.__wrapped__()
    except DeviceUnavailable:
        chosen = "refused"
    assert choice.expected_variant() == getattr(chosen, "variant", None)


def test_the_types_are_the_library_s() -> None:
    assert {name for name, found in FORMATS.items() if found.in_blocks} == choice.BLOCK_TYPES


@pytest.mark.parametrize(("missing", "variant"), [((), "avx512"), (("avx512_vnni",), "avx2"), (("f16c",), None)])
def test_the_best_that_the_cpu_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: tuple[str, ...], variant: str | None
) -> None:
    monkeypatch.setenv("RBEE_KERNELS", "auto")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(choice, "_built", lambda _variant: True)
    assert choice.expected_variant(cpu(tmp_path, *(ALL - set(missing)))) == variant


def test_none_where_the_system_says_nothing_or_nothing_was_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RBEE_KERNELS", "auto")
    assert choice.expected_variant(tmp_path) is None
    monkeypatch.setattr(choice, "_built", lambda _variant: False)
    assert choice.expected_variant(cpu(tmp_path, *ALL)) is None
