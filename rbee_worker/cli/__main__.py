"""``python -m rbee_worker.cli``: the same as ``rbee-worker``."""

from rbee_worker.cli import main

main()
