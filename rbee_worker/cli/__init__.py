"""The command ``rbee-worker``: one file per group of commands, put together in ``app``."""

import signal
import sys


def main() -> None:
    """Run the command line; always ends with SystemExit."""
    try:
        # Imported here so that Ctrl-C during the imports is an exit code too, not a traceback.
        from rbee_worker.cli.app import app  # noqa: PLC0415

        app(prog_name="rbee-worker")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # All is said: Ctrl-C while the interpreter takes itself apart should end it, not print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
