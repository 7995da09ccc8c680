"""The answers to one request: the events of its jobs as they come, and what they used."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self

from typing_extensions import TypedDict

from rbee_worker.errors import (
    Cancelled,
    DeadlineExceeded,
    InferenceError,
    OutOfMemory,
    RbeeError,
    Unavailable,
)
from rbee_worker.events import End, InferenceEvent, InferenceFailed, StopReason
from rbee_worker.worker.job import Job
from rbee_worker.worker.worker import Worker

FinishReason = Literal["stop", "length", "tool_calls"]
Arrival = tuple[int, InferenceEvent]

_FINISH: Final[dict[StopReason, FinishReason]] = {
    "eos": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "context_full": "length",
}
_FAILURES: Final[dict[str, type[RbeeError]]] = {
    kind.code: kind for kind in (InferenceError, DeadlineExceeded, Unavailable, OutOfMemory)
}


def finish_reason(end: End) -> FinishReason:
    """OpenAI's word for why an answer ended; ``stop`` for one that was cut on purpose."""
    return _FINISH.get(end.stop_reason, "stop")


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
    """Tokens that a request has used so far; a prompt counts once, however many answers it gets."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, end: End, *, first: bool) -> None:
        """Count an answer, and its prompt when it is the ``first`` to it."""
        self.completion_tokens += end.tokens_out
        if first:
            self.prompt_tokens += end.prompt_tokens
            self.cached_tokens += end.cached_tokens

    def to_dict(self) -> Usage:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answers:
    """The events of several jobs as they come: an asynchronous iterator of pairs of a job's position and its event.

    Its ``anext`` may be cancelled without loss. The first job that fails, or that somebody cancels, fails it:
    an answer that was cut short must not be taken for a whole one.

    Args:
        worker: told apart by its state are jobs that it cancels to shut down and those that a client cancels.
        jobs: submitted already; this is their only reader.

    Raises:
        RbeeError: from ``anext``: why a job failed.
    """

    def __init__(self, worker: Worker, jobs: Sequence[Job]) -> None:
        self._worker = worker
        self._jobs = tuple(jobs)
        self._left = len(jobs)
        self._cut: set[int] = set()
        self._arrived: asyncio.Queue[Arrival | BaseException] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] | None = None

    @property
    def ended(self) -> bool:
        """Whether the last event of every job has been given."""
        return self._left == 0

    def cancel(self) -> None:
        """Ask every job to end."""
        for job in self._jobs:
            job.cancel()

    def cut(self, index: int) -> None:
        """End one job early, on purpose: its answer counts as whole."""
        self._cut.add(index)
        self._jobs[index].cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Arrival:
        if self.ended:
            raise StopAsyncIteration
        index, event = await self._next()
        if isinstance(event, InferenceFailed):
            raise _FAILURES.get(event.code, InferenceError)(event.message)
        if isinstance(event, End):
            if event.stop_reason == "cancelled" and index not in self._cut:
                raise self._cancelled()
            self._left -= 1
        return index, event

    async def aclose(self) -> None:
        """Stop listening; jobs that have not ended are cancelled."""
        for reader in self._readers or ():
            reader.cancel()
        for job in self._jobs:
            await job.aclose()

    async def _next(self) -> Arrival:
        if len(self._jobs) == 1:
            return 0, await anext(self._jobs[0])
        if self._readers is None:
            self._readers = [asyncio.create_task(self._read(index)) for index in range(len(self._jobs))]
        arrival = await self._arrived.get()
        if isinstance(arrival, BaseException):
            raise arrival
        return arrival

    async def _read(self, index: int) -> None:
        try:
            async for event in self._jobs[index]:
                self._arrived.put_nowait((index, event))
        except Exception as error:  # noqa: BLE001  (whoever reads the answers gets it)
            self._arrived.put_nowait(error)

    def _cancelled(self) -> RbeeError:
        if self._worker.state == "draining":
            return Unavailable("The worker is shutting down.", retry_after=1)
        return Cancelled("The request was cancelled.")
