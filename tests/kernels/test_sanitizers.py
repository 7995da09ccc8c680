"""The kernels under sanitizers: no byte beyond what is given them is touched, nothing is undefined, no threads race."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from filelock import FileLock

from rbee_worker.kernels.formats import FORMATS
from rbee_worker.kernels.library import Variant, supported

ROOT = Path(__file__).parents[2]
CPP = ROOT / "rbee_worker" / "kernels" / "cpp"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
MEMORY, THREADS = "address,undefined", "thread"
HANG = 600

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # compilers of sanitized vectors take their time
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
]


class Calls:
    """``calls.cpp`` and the kernels in one program, under a sanitizer."""

    def __init__(self, folder: Path, variant: Variant, sanitizer: str) -> None:
        """``folder``: of all processes of a test run: a program is built once."""
        self.program = folder / f"calls-{variant}-{sanitizer}"
        with FileLock(f"{self.program}.lock"):
            if not self.program.exists():
                self._build(variant, sanitizer)

    def _build(self, variant: Variant, sanitizer: str) -> None:
        modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
        (module,) = (module for module in modules if module["name"].endswith(f"._{variant}"))
        # As it is built for users, but for the sanitizer, and with the lines of the source. -Og compiles three times as
        # fast as -O1. The three checks left out double the time, and a wrong address is found without them too.
        flags = [flag for flag in module["extra-compile-args"] if flag not in {"-O3", "-g0"}]
        flags += ["-Og", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize=null,object-size,vptr"]
        flags += ["-fno-sanitize-recover=all", f"-I{CPP}"]
        sources = [Path(__file__).with_name("calls.cpp"), *(ROOT / source for source in module["sources"])]
        made = self.program.with_suffix(".part")
        command = [str(COMPILER), *flags, *map(str, sources), "-o", str(made)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode and "cannot find" in built.stderr:
            pytest.skip(f"the compiler lacks the library of -fsanitize={sanitizer}")
        assert built.returncode == 0, built.stderr
        made.rename(self.program)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        # TSAN does not know how far newer systems move addresses about; it then ends before the first line.
        fixed = ["setarch", "-R"] if shutil.which("setarch") else []
        return subprocess.run(
            [*fixed, str(self.program), *words], capture_output=True, text=True, check=False, timeout=HANG
        )


@pytest.fixture(scope="module", params=["avx2", "avx512"])
def variant(request: pytest.FixtureRequest) -> Variant:
    if not supported(request.param):
        pytest.skip(f"this CPU lacks {request.param}")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def for_memory(variant: Variant, shared_tmp: Path) -> Calls:
    return Calls(shared_tmp, variant, MEMORY)


@pytest.fixture(scope="module")
def for_threads(variant: Variant, shared_tmp: Path) -> Calls:
    return Calls(shared_tmp, variant, THREADS)


def test_every_shape_stays_in_its_memory(for_memory: Calls) -> None:
    ended = for_memory.run("memory")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_threads_do_not_overrun_memory(for_memory: Calls) -> None:
    ended = for_memory.run("threads")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_threads_do_not_race(for_threads: Calls) -> None:
    ended = for_threads.run("threads")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_one_byte_too_few_is_found(for_memory: Calls) -> None:
    """So that the tests above can fail: a matrix of each format without its last byte."""
    for form in FORMATS.values():
        ended = for_memory.run("short", str(form.number))
        assert ended.returncode != 0, form.name
        assert "ERROR: AddressSanitizer" in ended.stderr, form.name


def test_a_race_is_found(for_threads: Calls) -> None:
    ended = for_threads.run("race")
    assert ended.returncode != 0
    assert "data race" in ended.stderr
