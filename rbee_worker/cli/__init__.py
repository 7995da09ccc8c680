"""The command ``rbee-worker``: a file for each command or pair of commands; ``app`` joins them."""

import signal
import sys

from rbee_worker.cli.standard_streams import prepare_standard_streams


def main() -> None:
    """Run the command line. Always ends with SystemExit."""
    prepare_standard_streams()
    try:
        # Imported here so that Ctrl-C during the imports gives an exit code, not a traceback.
        from rbee_worker.cli.app import app  # noqa: PLC0415

        app(prog_name="rbee-worker")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # All output is written. Ctrl-C while the interpreter shuts down should end it without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
