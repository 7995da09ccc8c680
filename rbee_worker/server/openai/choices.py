"""Choices: the jobs of one response, their events, and the tokens that they used."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Literal

from typing_extensions import TypedDict

from rbee_worker.errors import (
    Cancelled,
    DeadlineExceeded,
    InferenceError,
    OutOfMemory,
    RbeeError,
    Unavailable,
)
from rbee_worker.events import End, InferenceEvent, InferenceFailed, Started, StopReason
from rbee_worker.worker.job import Job
from rbee_worker.worker.worker import Worker

FinishReason = Literal["stop", "length", "tool_calls"]
Arrival = tuple[int, InferenceEvent]
"""The index of a choice, and an event of its job."""

_FINISH: Final[dict[StopReason, FinishReason]] = {
    "eos": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "context_full": "length",
}
_FAILURES: Final[dict[str, type[RbeeError]]] = {
    kind.code: kind for kind in (InferenceError, DeadlineExceeded, Unavailable, OutOfMemory)
}


class PromptTokensDetails(TypedDict):
    """Prompt tokens whose keys and values were reused."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of a request, all its answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@dataclass(slots=True)
class UsedTokens:
    """Tokens that a request has used so far. A prompt counts once, however many answers it gets."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def to_usage(self) -> Usage:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def finish_reason(end: End) -> FinishReason:
    """OpenAI's reason why a choice ended; ``stop`` for one that was cut on purpose."""
    return _FINISH.get(end.stop_reason, "stop")


class Choices:
    """The choices of one response.

    Args:
        worker: its state tells whether it cancelled a job to shut down, or a client did.
        jobs: one for each choice, already submitted. Nothing else may read their events.
        per_prompt: how many jobs in sequence have the same prompt.

    Attributes:
        used: the tokens of the choices that have ended.
    """

    def __init__(self, worker: Worker, jobs: Sequence[Job], *, per_prompt: int) -> None:
        self.used = UsedTokens()
        self._worker = worker
        self._jobs = tuple(jobs)
        self._per_prompt = per_prompt
        self._cut: set[int] = set()

    def cancel(self) -> None:
        """Cancel all jobs. Does not wait for their end."""
        for job in self._jobs:
            job.cancel()

    def cut(self, index: int) -> None:
        """End one choice early, on purpose. It counts as complete."""
        self._cut.add(index)
        self._jobs[index].cancel()

    async def events(self) -> AsyncGenerator[Arrival, None]:
        """The events of all choices, up to the last event of each. Closing this cancels the jobs that still run.

        ``started`` is held until the next event, so that a request that fails at once has no events.

        Raises:
            RbeeError: a job failed, or somebody cancelled it. So a part of an answer is never taken for a whole one.
        """
        begun: list[Arrival] = []
        async with aclosing(_merged(self._jobs)) as arrivals:
            async for index, event in arrivals:
                if isinstance(event, InferenceFailed):
                    raise _FAILURES.get(event.code, InferenceError)(event.message)
                if isinstance(event, End):
                    if event.stop_reason == "cancelled" and index not in self._cut:
                        raise self._cancelled()
                    self._count(index, event)
                begun.append((index, event))
                if not isinstance(event, Started):
                    for arrival in begun:
                        yield arrival
                    begun.clear()

    def _count(self, index: int, end: End) -> None:
        self.used.completion += end.tokens_out
        if index % self._per_prompt == 0:
            self.used.prompt += end.prompt_tokens
            self.used.cached += end.cached_tokens

    def _cancelled(self) -> RbeeError:
        if self._worker.state == "draining":
            return Unavailable("The worker is shutting down.", retry_after=1)
        return Cancelled("The request was cancelled.")


async def _merged(jobs: Sequence[Job]) -> AsyncGenerator[Arrival, None]:
    """The events of several jobs in the order in which they arrive. Closes the jobs at the end."""
    if len(jobs) == 1:  # the usual case, which needs no tasks and no queue
        async with aclosing(jobs[0]) as job:
            async for event in job:
                yield 0, event
        return
    arrived: asyncio.Queue[Arrival | None] = asyncio.Queue()

    async def read(index: int, job: Job) -> None:
        try:
            async for event in job:
                arrived.put_nowait((index, event))
        finally:
            arrived.put_nowait(None)

    readers = [asyncio.create_task(read(index, job)) for index, job in enumerate(jobs)]
    try:
        reading = len(readers)
        while reading:
            arrival = await arrived.get()
            if arrival is None:
                reading -= 1
            else:
                yield arrival
        await asyncio.gather(*readers)
    finally:
        for reader in readers:
            reader.cancel()
        for job in jobs:
            await job.aclose()
