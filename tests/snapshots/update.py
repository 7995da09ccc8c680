"""``make snapshots``: write the files anew."""

import tempfile
from pathlib import Path

from tests.snapshots.compare import HERE, write
from tests.snapshots.groups import GROUPS


def main() -> None:
    for name, take in GROUPS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(HERE / name, take(Path(folder)))


if __name__ == "__main__":
    main()
