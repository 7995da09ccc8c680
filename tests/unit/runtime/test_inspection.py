"""What inspection needs: headers and configs, and no torch, which takes seconds to import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
