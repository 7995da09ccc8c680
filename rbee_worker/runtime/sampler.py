"""Logits to tokens, each sequence with its own parameters and its own generator."""

import torch
from torch import Tensor

from rbee_worker.config import SamplingParams

_SEED_MASK = 2**64 - 1
_NUCLEUS_CANDIDATES = 256
_COLDEST = 1e-6
"""Temperatures below are no different from it, and float32 cannot divide by the smallest of them."""


class Sampler:
    """Chooses the next token of one sequence.

    In this order: repetition penalty (prompt and output), presence and frequency penalties (output), temperature,
    top-k, top-p, min-p, as Hugging Face's warpers go. A draw takes one number from the sequence's own
    generator, so the same seed gives the same text whatever else runs.

    Args:
        params: validated sampling parameters.
        seed: of the generator.
        prompt: token ids of the prompt.
        vocab_size: columns of the logits.
    """

    __slots__ = ("_counts", "_generator", "_params", "_seen")

    def __init__(self, params: SamplingParams, seed: int, prompt: list[int], vocab_size: int) -> None:
        self._params = params
        self._generator = torch.Generator().manual_seed(seed & _SEED_MASK)
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[prompt] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size)

    def sample(self, logits: Tensor) -> int:
        """The next token id from float32 logits [vocab_size], which may be overwritten."""
        greedy = self._params.temperature == 0
        token = int(self.penalize(logits).argmax()) if greedy else self._draw(*self.candidates(logits))
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def penalize(self, logits: Tensor) -> Tensor:
        """Logits [vocab_size] with the three penalties applied."""
        params = self._params
        if self._seen is not None:
            seen = self._seen.to(logits.device)
            factor = params.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
        if self._counts is not None:
            counts = self._counts.to(logits.device)
            logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        return logits

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens that may come next, for a temperature above 0.

        Returns:
            Their logits, of which the softmax is their probability, and their ids; None: all ids, in order.
        """
        params = self._params
        logits = self.penalize(logits)
        # From the maximum down, so that no temperature overflows: the likeliest stays at 0, the others sink.
        logits = (logits - logits.max()) / max(params.temperature, _COLDEST)
        ids: Tensor | None = None
        if 0 < params.top_k < logits.shape[0]:
            logits, ids = logits.topk(params.top_k)
        if params.top_p < 1:
            logits, ids = _nucleus(logits, ids, params.top_p)
        if params.min_p > 0:
            # p >= min_p * p_max, on logits: no softmax needed.
            floor = logits.max() + torch.tensor(params.min_p, device=logits.device).log()
            logits = logits.masked_fill(logits < floor, float("-inf"))
        return logits, ids

    def _draw(self, logits: Tensor, ids: Tensor | None) -> int:
        # Inverse transform in float64 on the host: one uniform number a token, on every device alike.
        cumulative = logits.double().softmax(-1).cumsum(-1).cpu()
        point = torch.rand(1, generator=self._generator, dtype=torch.float64) * cumulative[-1]
        index = torch.searchsorted(cumulative, point, right=True).clamp_(max=cumulative.shape[0] - 1)
        return int(index if ids is None else ids[index.to(ids.device)])


def _nucleus(logits: Tensor, ids: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest set of likeliest tokens whose probabilities reach ``top_p`` (arXiv:1904.09751), never empty.

    Returns:
        Their logits, likeliest first, and their ids.
    """
    probabilities = logits.softmax(-1)
    count = min(_NUCLEUS_CANDIDATES, logits.shape[0])
    while True:
        # The nucleus is nearly always small: look among the likeliest few before ordering the whole vocabulary.
        top, order = probabilities.topk(count)
        cumulative = top.cumsum(-1)
        if cumulative[-1] >= top_p or count == logits.shape[0]:
            break
        count = min(count * 8, logits.shape[0])
    keep = int((cumulative - top < top_p).sum()) or 1
    order = order[:keep]
    return logits[order], order if ids is None else ids[order]
