"""From one step's logits to the sequences' next tokens; drafts are checked on the way."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rbee_worker.errors import InferenceError
from rbee_worker.events import InferenceEvent
from rbee_worker.runtime.engine.sampler import Sampled, sample
from rbee_worker.runtime.engine.sequence import Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence whose next token is to be chosen.

    Attributes:
        sequence: the sequence.
        row: the row of the logits behind its last token; those of its drafts follow.
        drafts: tokens that were guessed to come next, and computed along with it.
    """

    sequence: Sequence
    row: int
    drafts: tuple[int, ...] = ()


def decide(logits: Tensor, candidates: list[Candidate]) -> Iterator[tuple[str, InferenceEvent]]:
    """Choose each sequence's next token, and go on behind every draft that turns out right.

    A draft is right when it is the very token that would have been chosen without it: the text, and the use of the
    sequence's generator, are the same with and without drafts.

    Args:
        logits: float32 [rows, vocab_size].
        candidates: of each sequence, its row and drafts.

    Yields:
        The events, each with its job's id.
    """
    place = 0
    while candidates:
        confirmed = []
        for candidate, outcome in zip(candidates, _choose(logits, place, candidates), strict=True):
            sequence = candidate.sequence
            for event in _take(sequence, outcome):
                yield sequence.job_id, event
            right = isinstance(outcome, Sampled) and candidate.drafts[place : place + 1] == (outcome.token,)
            if right and sequence.cache is not None:
                sequence.cache.advance(sequence.tokens, sequence.cache.length + 1)
                confirmed.append(candidate)
        candidates = confirmed
        place += 1


def _choose(logits: Tensor, place: int, candidates: list[Candidate]) -> list[Sampled | Exception]:
    """What each sequence chooses behind ``place`` confirmed drafts: all at once, one by one where that fails."""
    try:
        return [*_sample(logits, place, candidates)]
    except Exception as error:  # noqa: BLE001  (whoever is at fault is found one by one)
        if len(candidates) == 1:
            return [error]
        return [outcome for candidate in candidates for outcome in _choose(logits, place, [candidate])]


def _sample(logits: Tensor, place: int, candidates: list[Candidate]) -> list[Sampled]:
    samplers = [candidate.sequence.sampler for candidate in candidates]
    masks = {row: sampler.grammar.mask() for row, sampler in enumerate(samplers) if sampler.grammar is not None}
    return sample(logits[[candidate.row + place for candidate in candidates]], samplers, masks)


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
        yield sequence.fail(InferenceError.code, f"Sampling failed: {problem}")
