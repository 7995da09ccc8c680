"""Which variant is loaded, and what is refused before any of it reaches C++."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rbee_worker.cgroup import cpu_limit
from rbee_worker.errors import DeviceUnavailable
from rbee_worker.kernels import arguments, library
from rbee_worker.kernels.arguments import StoredMatrix, StoredWeights
from rbee_worker.kernels.formats import FORMATS, Format
from rbee_worker.kernels.library import Kernels, Variant, missing_reason
from tests.unit.kernels.matrices import HERE, MISSING, columns_of, make_matrix, normal

needs_a_variant = pytest.mark.skipif(not HERE, reason="; ".join(MISSING.values()))


@pytest.fixture(autouse=True)
def chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice, which a process makes once, is made in the test; what was chosen before comes back after it."""
    monkeypatch.setattr(library, "_choose", library._choose.__wrapped__)
    monkeypatch.setenv("RBEE_KERNELS", "auto")


def force(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RBEE_KERNELS", value)


# ------------------------------------------------------------------------------------------------------------- choice


@needs_a_variant
def test_the_best_variant_is_chosen_with_the_threads_of_torch() -> None:
    kernels = library.cpu_kernels()
    assert kernels is not None
    assert kernels.variant == HERE[-1]
    assert kernels.threads == min(torch.get_num_threads(), len(os.sched_getaffinity(0)), cpu_limit() or 2**16)
    assert missing_reason() is None


@pytest.mark.parametrize(
    ("torch_s", "cores", "quota", "threads"), [(8, 6, None, 6), (8, 6, 3, 3), (2, 6, 3, 2), (8, 6, 9, 6), (1, 6, 1, 1)]
)
def test_threads_keep_to_cores_quota_and_torch_s_number(
    monkeypatch: pytest.MonkeyPatch, torch_s: int, cores: int, quota: int | None, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_s)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)))
    monkeypatch.setattr(library, "cpu_limit", lambda: quota)
    assert library._threads() == threads


def test_a_forced_variant_is_chosen(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, variant)
    kernels = library.cpu_kernels()
    assert kernels is not None
    assert kernels.variant == variant


def test_none_is_chosen_where_torch_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "torch")
    assert library.cpu_kernels() is None
    assert missing_reason() == "RBEE_KERNELS is torch."


@needs_a_variant
@pytest.mark.parametrize("value", [None, ""])
def test_the_best_is_chosen_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("RBEE_KERNELS")
    if value is not None:
        force(monkeypatch, value)
    kernels = library.cpu_kernels()
    assert kernels is not None
    assert kernels.variant == HERE[-1]


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("nonsense", "AVX2", " avx2"):
        force(monkeypatch, word)
        with pytest.raises(DeviceUnavailable, match=f"RBEE_KERNELS is '{word}'; it may be auto, torch, avx2, avx512"):
            library.cpu_kernels()


@needs_a_variant
def test_the_environment_of_a_process_chooses() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "from rbee_worker.kernels.library import cpu_kernels; print(cpu_kernels().variant)"],
        env=os.environ | {"RBEE_KERNELS": HERE[0]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, f"{HERE[0]}\n"), ended.stderr


def test_a_cpu_without_the_instructions_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "fma3": True})
    assert library.cpu_kernels() is None
    assert missing_reason() == "This CPU lacks avx2 and avx512."
    force(monkeypatch, "avx512")
    with pytest.raises(DeviceUnavailable, match=r"RBEE_KERNELS is 'avx512'. This CPU lacks avx512."):
        library.cpu_kernels()


@needs_a_variant
def test_a_cpu_with_avx2_alone_gets_that_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx2" in MISSING:
        pytest.skip(MISSING["avx2"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "fma3": True, "f16c": True})
    kernels = library.cpu_kernels()
    assert kernels is not None
    assert kernels.variant == "avx2"


@needs_a_variant
def test_without_threads_to_be_had_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: Kernels, _variant: Variant, threads: int) -> None:
        raise MemoryError(f"{threads} threads for the kernels")

    monkeypatch.setattr(Kernels, "__init__", refuse)
    assert library.cpu_kernels() is None
    assert "threads for the kernels" in str(missing_reason())


def test_an_installation_without_the_files_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "supported", lambda _variant: True)
    monkeypatch.setattr(library, "_module", lambda variant: f"rbee_worker.kernels._not_{variant}")
    assert library.cpu_kernels() is None
    assert "no C++ compiler was found" in str(missing_reason())
    with pytest.raises(OSError, match="the kernels for avx2 were not built"):
        Kernels("avx2", 1)
    force(monkeypatch, "avx2")
    with pytest.raises(DeviceUnavailable, match=r"RBEE_KERNELS is 'avx2'. They were not built"):
        library.cpu_kernels()


def test_a_file_that_is_no_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "_avx2.so"
    path.write_bytes(b"\x7fELF, and no more")
    monkeypatch.setattr(library, "supported", lambda _variant: True)
    monkeypatch.setattr(library, "built", lambda _variant: True)
    monkeypatch.setattr(library, "_path", lambda _variant: str(path))
    assert library.cpu_kernels() is None
    assert str(missing_reason()).startswith(f"Their library does not load: {path}: ")


def test_a_library_of_another_version_is_a_reason(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.ABI_VERSION
    monkeypatch.setattr(library, "ABI_VERSION", found + 1)
    with pytest.raises(OSError, match=f"the kernels are of version {found}, not {found + 1}: build them again"):
        Kernels(variant, 1)
    force(monkeypatch, variant)
    with pytest.raises(DeviceUnavailable, match=f"does not load: the kernels are of version {found}"):
        library.cpu_kernels()


def test_a_matrix_is_described_as_the_library_reads_it() -> None:
    """``Matrix`` of ``cpp/abi.h``: on the CPUs of the variants, four words of eight bytes and two of four."""
    assert ctypes.sizeof(arguments.Matrix) == 40
    matrix = make_matrix(FORMATS["Q4_K"], 3, 512)
    described = arguments._described(matrix)
    assert (described.data, described.rows, described.columns) == (matrix.data.data_ptr(), 3, 512)
    assert (described.row_bytes, described.format) == (288, 6)


# ------------------------------------------------------------------------------------------------------------ refusals


class Untouched(Kernels):
    """Kernels without a library: what calls it fails the test."""

    def __init__(self) -> None:
        self._context = None

        def called(*_arguments: object) -> int:
            raise AssertionError("C++ was called")

        self._linear = self._rows = called  # type: ignore[assignment]


WEIGHTS = StoredWeights([make_matrix(FORMATS["Q8_0"], 5, 64), make_matrix(FORMATS["F16"], 2, 64)])


@pytest.mark.parametrize(
    "x",
    [
        normal(3, 64).double(),
        normal(3, 64).half(),
        torch.ones(3, 64, dtype=torch.int32),
        normal(3, 63),
        normal(3, 65),
        normal(64, 3),
        normal(64),
        normal(1, 3, 64),
        torch.tensor(1.0),
        torch.empty(3, 64, device="meta"),
    ],
    ids=lambda x: f"{x.dtype}-{list(x.shape)}-{x.device}",
)
def test_activations_of_another_form_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^x is torch\.\w+ \[.*\] on .*; torch.float32 \[.*64\] is needed"):
        Untouched().linear(x, WEIGHTS)


@pytest.mark.parametrize(
    "bias",
    [normal(7).double(), normal(6), normal(8), normal(1, 7), normal(14)[::2], torch.empty(7, device="meta")],
    ids=lambda bias: f"{bias.dtype}-{list(bias.shape)}-{bias.stride()}-{bias.device}",
)
def test_a_bias_of_another_form_is_refused(bias: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^bias is .*; torch.float32 \[7\] is needed, contiguous and on cpu"):
        Untouched().linear(normal(3, 64), WEIGHTS, bias)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0], dtype=torch.int32), r"rows is torch.int32 \[1\] on cpu; torch.int64 \[1\] is needed"),
        (torch.tensor([0.0]), r"rows is torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int64), r"rows is torch.int64 \[2, 3\]"),
        (torch.tensor(0), r"rows is torch.int64 \[\]"),
        (torch.arange(4)[::2], r"rows is torch.int64 \[2\] on cpu; torch.int64 \[2\] is needed, contiguous"),
        (torch.tensor([0, 5]), "rows 0 to 5 of a matrix of 5 rows"),
        (torch.tensor([2, -1, 3]), "rows -1 to 3 of a matrix of 5 rows"),
        (torch.tensor([2**62]), "rows 4611686018427387904 to 4611686018427387904 of a matrix of 5 rows"),
    ],
    ids=str,
)
def test_rows_that_are_not_there_are_refused(rows: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Untouched().rows(StoredWeights([make_matrix(FORMATS["Q8_0"], 5, 64)]), rows)


def test_rows_of_several_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="rows are of one matrix, not of 2"):
        Untouched().rows(WEIGHTS, torch.tensor([0]))


def test_a_matrix_of_another_form_is_refused(form: Format) -> None:
    columns = columns_of(form, 64)
    right = make_matrix(form, 4, columns)
    other = torch.int8 if form.in_blocks else torch.float64
    wrong = {
        "dtype": right.data.to(other),
        "rows": right.data[:3],
        "more rows": torch.cat([right.data, right.data]),
        "columns": right.data[:, :-1].contiguous(),
        "strided": torch.cat([right.data, right.data], 1)[:, : right.data.shape[1]],
        "flat": right.data.flatten(),
        "turned": right.data.T.contiguous(),
        "elsewhere": right.data.to("meta"),
    }
    StoredWeights([right])
    for data in wrong.values():
        with pytest.raises(ValueError, match=rf"^a matrix of {form.name} is .* is needed, contiguous and on cpu"):
            StoredWeights([StoredMatrix(data, form, 4, columns)])


def test_columns_are_whole_blocks() -> None:
    for name, columns in (("Q8_0", 33), ("Q4_0", 31), ("Q4_K", 128), ("Q6_K", 257)):
        form = FORMATS[name]
        with pytest.raises(ValueError, match=f"{columns} weights are no whole number of blocks of {form.block}"):
            StoredWeights([StoredMatrix(torch.zeros(1, form.block_bytes, dtype=torch.uint8), form, 1, columns)])


def test_matrices_of_several_widths_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices of one width are needed, not of \[64, 96\]"):
        StoredWeights([make_matrix(FORMATS["F32"], 5, 64), make_matrix(FORMATS["F32"], 5, 96)])
    with pytest.raises(ValueError, match=r"matrices of one width are needed, not of \[\]"):
        StoredWeights([])


def test_a_format_that_the_library_does_not_know_is_an_error(kernels: Kernels) -> None:
    unknown = Format("F32", 99, 1, 4, torch.float32)
    weights = StoredWeights([StoredMatrix(torch.ones(2, 3), unknown, 2, 3)])
    with pytest.raises(ValueError, match="an unknown weight format"):
        kernels.linear(torch.ones(1, 3), weights)
    with pytest.raises(ValueError, match="an unknown weight format"):
        kernels.rows(weights, torch.tensor([0]))


def test_at_least_one_thread_is_needed(variant: Variant) -> None:
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"{threads} threads for the kernels: at least 1 is needed"):
            Kernels(variant, threads)
