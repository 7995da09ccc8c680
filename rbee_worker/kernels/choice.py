"""Which variant of the kernels a process will load, told without torch; and the types of blocks that they multiply by.

``library`` chooses when it loads them, and asks torch what the CPU has. A command that reads headers alone asks here.
"""

import importlib.util
import os
import re
from pathlib import Path
from typing import Literal

Variant = Literal["avx2", "avx512"]

BLOCK_TYPES = frozenset({"Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"})
"""Names of the block formats in ``formats``: GGUF's types that the kernels multiply by."""

_FLAGS: dict[Variant, tuple[str, ...]] = {
    "avx512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "avx2": ("avx2", "fma", "f16c"),
}
"""What a CPU must have, by the names in ``/proc/cpuinfo``. The best variant comes first."""


def expected_variant(root: Path = Path("/")) -> Variant | None:
    """The variant that this process will load for ``RBEE_KERNELS``; None: it will compute with torch alone.

    Args:
        root: the folder that holds ``proc``.
    """
    asked = os.environ.get("RBEE_KERNELS") or "auto"
    flags = _cpu_flags(root)
    if not os.environ.get("ATEN_CPU_CAPABILITY", "avx512").startswith("avx512"):
        flags = frozenset(flag for flag in flags if not flag.startswith("avx512"))
    for variant, needed in _FLAGS.items():
        if asked in ("auto", variant) and flags.issuperset(needed) and _built(variant):
            return variant
    return None


def _cpu_flags(root: Path) -> frozenset[str]:
    """What the first processor has; nothing where the system does not say it in this way."""
    try:
        text = (root / "proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found is not None else frozenset()


def _built(variant: Variant) -> bool:
    return importlib.util.find_spec(f"{__package__}.cpp._{variant}") is not None
