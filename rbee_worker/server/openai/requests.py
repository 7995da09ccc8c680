"""What the requests of one call share, and how they differ."""

import uuid
from collections.abc import Iterator
from typing import Final

from rbee_worker.config import SEED_MAX

_SEEDS: Final = SEED_MAX + 1


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
