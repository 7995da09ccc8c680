"""Every error: its class, exit code, HTTP status and code."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import rbee_worker
from rbee_worker.errors import RbeeError


def take(_folder: Path) -> dict[str, str]:
    """One table, subclasses below their class and indented."""
    for module in pkgutil.walk_packages(rbee_worker.__path__, "rbee_worker."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    head = f"{'class':32}{'exit':>4}  {'status':>6}  code\n"
    return {"errors.txt": head + "".join(_rows(RbeeError, 0))}


def _rows(error: type[RbeeError], depth: int) -> Iterator[str]:
    yield f"{'  ' * depth + error.__name__:32}{error.exit_code:>4}  {error.http_status:>6}  {error.code}\n"
    for below in sorted(error.__subclasses__(), key=lambda kind: kind.__name__):
        if below.__module__.startswith("rbee_worker."):  # not those that tests make
            yield from _rows(below, depth + 1)
