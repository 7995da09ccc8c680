"""Finds MODEL for commands that do not load it. If it must be downloaded, lines on stderr show the progress."""

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rbee_worker.display import PlainProgress
    from rbee_worker.runtime.hub.download import Step
    from rbee_worker.runtime.source import ModelSource


def resolve_shown(model: str | None, *, quiet: bool) -> "ModelSource":
    """The model that ``model`` names. It is downloaded if it is on the hub and not in the cache.

    Raises:
        RbeeError: as :func:`rbee_worker.runtime.source.resolve`.
    """
    from rbee_worker.runtime.source import resolve  # noqa: PLC0415 - numpy

    if quiet:
        return resolve(model)
    with ExitStack() as stack:
        lines = _Lines(stack)
        return resolve(model, lines.show)


class _Lines:
    """Writes lines. It imports the display at the first step, so that a model without a download does not need it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._began = time.monotonic()
        self._count = 0
        self._sink: PlainProgress | None = None

    def show(self, step: "Step") -> None:
        from rbee_worker.display import PlainProgress  # noqa: PLC0415 - rich

        if self._sink is None:
            self._sink = self._stack.enter_context(PlainProgress(sys.stderr))
        self._sink(step.event(seq=self._count, elapsed_seconds=round(time.monotonic() - self._began, 3)))
        self._count += 1
