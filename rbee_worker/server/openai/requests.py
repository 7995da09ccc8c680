"""What the requests of one call share, and how they differ."""

import uuid
from collections.abc import Iterator
from typing import Annotated, Final

from pydantic import Field
from typing_extensions import TypedDict

from rbee_worker.config import SEED_MAX
from rbee_worker.events import PromptProgress

_SEEDS: Final = SEED_MAX + 1


class PromptFigures(TypedDict):
    """How much of the prompt has been processed."""

    total: Annotated[int, Field(description="Its tokens.")]
    cache: Annotated[int, Field(description="Those whose keys and values were reused.")]
    processed: Annotated[int, Field(description="Those done, reused ones included.")]
    time_ms: Annotated[int, Field(description="Milliseconds since it began.")]


def new_id(kind: str) -> str:
    """An id for a response, such as ``cmpl-…``."""
    return f"{kind}-{uuid.uuid4().hex}"


def choice_ids(response_id: str) -> Iterator[str]:
    """Job ids for a response's choices, without end; the first is the response's own, so that it can be cancelled."""
    yield response_id
    number = 0
    while True:
        number += 1
        yield f"{response_id}-{number}"


def choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of a choice: each draws differently, and the first as a request for one would."""
    if seed is None or choice == 0:
        return seed
    return (seed + choice) % _SEEDS


def prompt_figures(event: PromptProgress) -> PromptFigures:
    """``prompt_progress`` of a chunk, as llama.cpp has it."""
    return {
        "total": event.total,
        "cache": event.cached,
        "processed": event.processed,
        "time_ms": event.elapsed_ms,
    }
