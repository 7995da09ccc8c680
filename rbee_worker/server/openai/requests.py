"""The ids and seeds of the jobs of one response."""

import uuid
from collections.abc import Iterator
from typing import Final

from rbee_worker.config import SEED_MAX

_SEEDS: Final = SEED_MAX + 1


def new_id(kind: str) -> str:
    """A new id for a response, such as ``cmpl-…`` for the kind ``cmpl``."""
    return f"{kind}-{uuid.uuid4().hex}"


def choice_ids(response_id: str) -> Iterator[str]:
    """Job ids for the choices of a response, without end. The first is the response's id: clients cancel by it."""
    yield response_id
    number = 0
    while True:
        number += 1
        yield f"{response_id}-{number}"


def choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of a choice. Each choice has another one; the first has the request's own. None: random."""
    if seed is None or choice == 0:
        return seed
    return (seed + choice) % _SEEDS
