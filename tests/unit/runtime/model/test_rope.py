"""The tables of rotary embedding."""

import subprocess
import sys


def test_large_tables_are_made_without_several_times_their_memory() -> None:
    code = (
        "import resource, torch\n"
        "from rbee_worker.runtime.architecture.config import RopeScaling\n"
        "from rbee_worker.runtime.model.rope import Rotary\n"
        "torch.set_num_threads(1)\n"
        "Rotary(RopeScaling(), 64, 16, torch.device('cpu'))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rotary = Rotary(RopeScaling(), 64, 2**18, torch.device('cpu'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    tables = 2 * 2**18 * 64 * 4 // 1024
    assert int(done.stdout) < 1.5 * tables
