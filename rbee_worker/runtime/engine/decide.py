"""From one step's logits to the sequences' next tokens; drafts are checked on the way."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rbee_worker.errors import InferenceError
from rbee_worker.escape import reason
from rbee_worker.events import InferenceEvent
from rbee_worker.runtime.engine.sampler import Sampled, sample
from rbee_worker.runtime.engine.sequence import Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LogitsRow:
    """Where the logits of a sequence's next token are.

    Attributes:
        sequence: the sequence.
        row: of the logits, behind its last token; the rows of its drafts follow.
        drafts: tokens that were guessed to come next, and computed along with it.
    """

    sequence: Sequence
    row: int
    drafts: tuple[int, ...] = ()


def decide(logits: Tensor, rows: list[LogitsRow]) -> Iterator[tuple[str, InferenceEvent]]:
    """Choose each sequence's next token, and go on behind every draft that turns out right.

    A draft is right when it is the very token that would have been chosen without it: the text, and the use of the
    sequence's generator, are the same with and without drafts.

    Args:
        logits: float32 [rows, vocab_size].
        rows: of each sequence, its row and drafts.

    Yields:
        The events, each with its job's id.
    """
    confirmed = 0
    while rows:
        going_on = []
        for row, outcome in zip(rows, _choose(logits, confirmed, rows), strict=True):
            sequence = row.sequence
            for event in _take(sequence, outcome):
                yield sequence.job_id, event
            right = isinstance(outcome, Sampled) and row.drafts[confirmed : confirmed + 1] == (outcome.token,)
            if right and sequence.cache is not None:
                sequence.cache.advance(sequence.tokens, sequence.cache.length + 1)
                going_on.append(row)
        rows = going_on
        confirmed += 1


def _choose(logits: Tensor, confirmed: int, rows: list[LogitsRow]) -> list[Sampled | Exception]:
    """What each sequence chooses behind its ``confirmed`` drafts: all at once, one by one where that fails."""
    try:
        return [*_sample(logits, confirmed, rows)]
    except Exception as error:  # noqa: BLE001  (whoever is at fault is found one by one)
        if len(rows) == 1:
            return [error]
        return [outcome for row in rows for outcome in _choose(logits, confirmed, [row])]


def _sample(logits: Tensor, confirmed: int, rows: list[LogitsRow]) -> list[Sampled]:
    samplers = [row.sequence.sampler for row in rows]
    masks = {index: sampler.grammar.mask() for index, sampler in enumerate(samplers) if sampler.grammar is not None}
    return sample(logits[[row.row + confirmed for row in rows]], samplers, masks)


def _take(sequence: Sequence, outcome: Sampled | Exception) -> Iterator[InferenceEvent]:
    """What a sequence makes of its token; an error ends it, and it alone."""
    problem: Exception | None = None
    if isinstance(outcome, Exception):
        problem = outcome
    else:
        try:
            yield from sequence.append(outcome)
        except Exception as error:  # noqa: BLE001  (the others' tokens are not lost with it)
            problem = error
    if problem is not None:
        if not isinstance(problem, InferenceError):
            logger.error("sampling failed", exc_info=problem)
        yield sequence.fail(InferenceError.code, f"Sampling failed: {reason(problem)}")
