"""The runtime and the worker name no option of the command line and no route: they do not know who speaks."""

import re
from pathlib import Path

import rbee_worker

NAMES = re.compile(r"(?<![\w-])--[a-z]|\b(GET|POST|PUT|DELETE) /|/v1/|`rbee-worker ")
OTHERS = ("llama-gguf-split --merge", "pip install --no-deps")
"""Options of other programs."""


def test_no_option_and_no_route_is_named():
    root = Path(rbee_worker.__file__).parent
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for folder in ("runtime", "worker")
        for path in sorted((root / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if NAMES.search(line) and not any(other in line for other in OTHERS)
    ]
    assert found == []
