"""``python -m rbee_worker``: the command."""

from rbee_worker.cli import main

if __name__ == "__main__":
    main()
