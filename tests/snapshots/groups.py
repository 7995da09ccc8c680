"""Every group of snapshots: the folder's name, and what takes its files."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.snapshots import bench, commands, errors, loading, openapi, served

GROUPS: Mapping[str, Callable[[Path], dict[str, str]]] = {
    "bench": bench.take,
    "commands": commands.take,
    "errors": errors.take,
    "loading": loading.take,
    "openapi": openapi.take,
    "served": served.take,
}
"""Each function is given an empty folder for models and returns file name -> text."""
