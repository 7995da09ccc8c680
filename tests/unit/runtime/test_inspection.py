"""What inspection needs: headers and configs, and no torch, which takes seconds to import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rbee_worker.runtime import inspection
from rbee_worker.runtime.inspection import inspect_model
from rbee_worker.runtime.source import resolve
from tests.tiny import write_tiny_model

INSPECT = "from rbee_worker.runtime.source import resolve; print(inspect_model(resolve({!r}), None).name)"
COMMAND = "from rbee_worker.cli import main; sys.argv = ['rbee-worker', 'inspect', {!r}, '--json']; main()"


@pytest.mark.parametrize("used", ["", INSPECT, COMMAND], ids=["imported", "used", "command"])
def test_torch_is_never_imported(tmp_path: Path, used: str) -> None:
    model = str(write_tiny_model(tmp_path / "m"))
    code = (
        "import sys; from rbee_worker.runtime.inspection import inspect_model\n"
        f"try: {used.format(model) or 'pass'}\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "False\n"
    assert not used or "m" in (json.loads(done.stdout)["name"] if used == COMMAND else done.stdout)


def test_without_kernels_blocks_are_decoded_and_the_report_says_the_same(
    gguf_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "expected_variant", lambda: None)
    found = inspect_model(resolve(str(gguf_path)), None)
    assert found.runs_as == "float16 or bfloat16 (Q8_0, Q4_1 decoded: no CPU kernels)"
    assert [need.dtype for need in found.memory] == ["bfloat16", "float16", "float32", "int8"]
    command = [sys.executable, "-m", "rbee_worker", "load", str(gguf_path), "--json", "--device", "cpu"]
    done = subprocess.run(
        command, env=os.environ | {"RBEE_KERNELS": "torch"}, capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout.splitlines()[-1])["report"]
    assert report["runs_as"].endswith("(Q8_0, Q4_1 decoded: no CPU kernels)")
    assert report["cpu_kernels"] == "none. RBEE_KERNELS is torch."


def test_plain_weights_run_in_the_width_that_most_of_them_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variant, told in ((None, "float16 or bfloat16"), ("avx2", "float16")):
        monkeypatch.setattr(inspection, "expected_variant", lambda variant=variant: variant)
        found = inspect_model(resolve(str(write_tiny_model(tmp_path / "m"))), None)
        assert (found.runs_as, found.memory[0].dtype) == (told, "bfloat16")
