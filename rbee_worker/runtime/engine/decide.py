"""From one step's logits to the sequences' next tokens, guesses checked on the way."""

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
class Guess:
    """A sequence whose next token is to be chosen.

    Attributes:
        row: the row of the logits behind its last token; those of its guesses follow.
        drafts: the guesses, which were computed along with it.
    """

    sequence: Sequence
    row: int
    drafts: tuple[int, ...] = ()


def decide(logits: Tensor, guesses: list[Guess]) -> Iterator[tuple[str, InferenceEvent]]:
    """Choose each sequence's next token, and go on behind every guess that turns out right.

    A guess is right when it is the very token that would have been chosen without it: the text, and the use of the
    sequence's generator, are the same with and without guesses.

    Args:
        logits: float32 [rows, vocab_size].
        guesses: of each sequence, its row and drafts.

    Yields:
        What comes of it, with the job's id.
    """
    place = 0
    while guesses:
        confirmed = []
        for guess, outcome in zip(guesses, _choose(logits, place, guesses), strict=True):
            sequence = guess.sequence
            for event in _take(sequence, outcome):
                yield sequence.job_id, event
            right = isinstance(outcome, Sampled) and guess.drafts[place : place + 1] == (outcome.token,)
            if right and sequence.cache is not None:
                sequence.cache.advance(sequence.tokens, sequence.cache.length + 1)
                confirmed.append(guess)
        guesses = confirmed
        place += 1


def _choose(logits: Tensor, place: int, guesses: list[Guess]) -> list[Sampled | Exception]:
    """What each sequence chooses behind ``place`` confirmed guesses: all at once, one by one where that fails."""
    try:
        return [*_sample(logits, place, guesses)]
    except Exception as error:  # noqa: BLE001  (whoever is at fault is found one by one)
        if len(guesses) == 1:
            return [error]
        return [outcome for guess in guesses for outcome in _choose(logits, place, [guess])]


def _sample(logits: Tensor, place: int, guesses: list[Guess]) -> list[Sampled]:
    samplers = [guess.sequence.sampler for guess in guesses]
    masks = {row: sampler.grammar.mask() for row, sampler in enumerate(samplers) if sampler.grammar is not None}
    return sample(logits[[guess.row + place for guess in guesses]], samplers, masks)


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
