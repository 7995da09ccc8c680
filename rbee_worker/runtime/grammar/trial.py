"""Tries grammars out in a process of its own, so that none can harm this one.

llguidance's own limits do not bound everything: some grammars take hours, gigabytes, or more stack than there is. So
every new grammar is first compiled in another process, under limits of the operating system.

When this module is run, it is that process. It reads from stdin a tokenizer, then grammars, each as a line of JSON. It
answers each with a line of JSON: a string that says why the grammar is refused, or an empty one.
"""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbee_worker.errors import InferenceError
from rbee_worker.runtime.grammar.build import Refused, build, large_stack, load_tokenizer, try_first_mask

if TYPE_CHECKING:
    from llguidance import LLTokenizer

CPU_SECONDS = 2.0
"""Processor time that compiling a grammar may take."""
MASK_CPU_SECONDS = 0.25
"""Processor time that the first mask may take. In the worker, all running jobs wait for it."""
MEMORY_BYTES = 64 * 2**20
"""Memory that compiling a grammar and its first mask may take."""

_START_SECONDS = 60.0
_ANSWER_SECONDS = 30.0
"""Waiting time for an answer. It is much longer than the processor time above, for busy machines."""
_NICENESS = 5
"""The process yields to the worker, where jobs are running."""


class Trial:
    """The process. It must be started again after a grammar has ended it. Not thread-safe."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._stop: weakref.finalize[..., Any] | None = None

    @property
    def running(self) -> bool:
        """Whether the process was started, and :meth:`refusal` or :meth:`close` has not ended it."""
        return self._process is not None

    def start(self, tokenizer: str, vocab_size: int, eos_ids: list[int]) -> None:
        """Start the process. The arguments are those of :func:`~.build.load_tokenizer`.

        Raises:
            InferenceError: the operating system cannot start it.
        """
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        try:
            process = subprocess.Popen(  # noqa: S603  (this very program)
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,
            )
        except OSError as error:
            raise InferenceError(f"The process that tries grammars out cannot be started: {error}.") from error
        self._process, self._ready, self._stop = process, False, weakref.finalize(self, _end, process)
        _write(process, [tokenizer, vocab_size, eos_ids])

    def refusal(self, grammar: str) -> str | None:
        """Try a grammar.

        Args:
            grammar: as :func:`~.build.source` makes it.

        Returns:
            Why the grammar is refused; empty: it is accepted. None: the process has ended, but perhaps because of what
            earlier grammars left in memory. Start it and ask again.

        Raises:
            InferenceError: the process was not started, or ended before it was ready.
        """
        process, fresh = self._process, not self._ready
        if process is None:
            raise InferenceError("The process that tries grammars out was not started.")
        if fresh and _read(process, _START_SECONDS) is None:
            self.close()
            raise InferenceError(f"The process that tries grammars out ended with status {process.returncode}.")
        self._ready = True
        _write(process, grammar)
        answer = _read(process, _ANSWER_SECONDS)
        if answer is not None:
            return answer
        alive = process.poll() is None
        self.close()
        if alive or process.returncode == -signal.SIGPROF:
            return f"it takes more than {CPU_SECONDS:g} s to compile, or {MASK_CPU_SECONDS:g} s to begin with"
        return f"it needs more than {MEMORY_BYTES // 2**20} MiB, or is nested too deeply" if fresh else None

    def close(self) -> None:
        """End the process."""
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _write(process: "subprocess.Popen[bytes]", value: object) -> None:
    if process.stdin is None:
        return
    # If the process has ended, the missing answer shows it.
    with contextlib.suppress(OSError):
        process.stdin.write(json.dumps(value).encode() + b"\n")
        process.stdin.flush()


def _read(process: "subprocess.Popen[bytes]", seconds: float) -> str | None:
    """The string in the next line that the process writes. None: no line came in time, or the process has ended."""
    if process.stdout is None:
        return None
    ends, line = time.monotonic() + seconds, b""
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(max(ends - time.monotonic(), 0) * 1000):
            return None
        piece = os.read(process.stdout.fileno(), 65536)
        if not piece:
            process.wait()
            return None
        line += piece
    return str(json.loads(line))


def _limit_memory() -> None:
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:  # not Linux
        return
    used = int(status.partition("VmData:")[2].split()[0]) * 1024
    limit = used + MEMORY_BYTES
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> None:
    """Run the process; see the module's docstring."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICENESS)
    text, vocab_size, eos_ids = json.loads(sys.stdin.buffer.readline())
    tokenizer = load_tokenizer(text, vocab_size, eos_ids)
    del text
    with large_stack() as thread:
        _limit_memory()
        _answer("")
        for line in sys.stdin.buffer:
            _answer(_refusal(thread, tokenizer, json.loads(line)))


def _refusal(thread: Executor, tokenizer: "LLTokenizer", grammar: str) -> str:
    # The timer counts processor time of this process. When it runs out, its signal ends the process.
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        matcher = thread.submit(build, tokenizer, grammar).result()
        signal.setitimer(signal.ITIMER_PROF, MASK_CPU_SECONDS)
        try_first_mask(matcher)
    except Refused as refused:
        return str(refused)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return ""


def _answer(value: str) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
