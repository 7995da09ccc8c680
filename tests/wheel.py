"""Checks a wheel: ``python -m tests.wheel dist``. It must have the CPU kernels, be small, and work where it is put."""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

LARGEST = 2 * 2**20
RUNS = """
import torch
from rbee_worker.kernels import library
from rbee_worker.kernels.arguments import StoredWeights
from rbee_worker.kernels.library import Kernels
from rbee_worker.runtime.model.linear.stored import plain_matrix

for variant in filter(library.supported, ("avx2", "avx512")):
    weight, x = torch.randn(30, 70), torch.randn(3, 70)
    y = Kernels(variant, 2).linear(x, StoredWeights([plain_matrix(weight)]))
    assert torch.allclose(y, x @ weight.T, atol=1e-4)
    print(f"{variant} runs, from {library.__file__}")
"""


def check(folder: Path) -> None:
    """Raise AssertionError for a wheel that will not do."""
    (wheel,) = folder.glob("*.whl")
    size = wheel.stat().st_size
    assert size < LARGEST, f"{wheel.name} has {size:,} bytes, more than {LARGEST:,}"
    assert not wheel.stem.endswith("-any"), f"{wheel.name} has no platform: the kernels were not built"
    with TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for variant in ("avx2", "avx512"):
            assert any(f"kernels/cpp/_{variant}." in name for name in names), f"{variant} is not in {wheel.name}"
        archive.extractall(place)
        subprocess.run([sys.executable, "-c", RUNS], check=True, cwd=place, env={"PYTHONPATH": place})
    print(f"{wheel.name}: {size:,} bytes")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
