"""Sampler: logits to tokens, in one vectorized pass for all sequences of a step.

Each sequence has its own parameters and its own generator. Its choice depends on its own row of logits and its own
:class:`Sampler` alone, not on the others in the batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.config import SamplingParams
from rbee_worker.errors import InferenceError
from rbee_worker.runtime.formats.finite import all_finite
from rbee_worker.runtime.grammar.compiler import GrammarMatcher
from rbee_worker.runtime.grammar.mask import apply_masks

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
GrammarMask = npt.NDArray[np.int32]

_SEED_MASK = 2**64 - 1
_NUCLEUS_CANDIDATES = 256
_SUM_BLOCK = 256
_BELOW_ONE = 1 - 2**-53
_COLDEST = 1e-6
"""Lower temperatures give the same result, and float32 cannot divide by the smallest of them."""
_LEAST_PENALTY = 1e-6
"""Smaller repetition penalties would make logits infinite."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The model's log-probabilities at one position: of the token there, and of the likeliest tokens in order."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token, with its likelihood where the parameters ask for it."""

    token: int
    likelihood: Likelihood | None = None


class Sampler:
    """What a sequence's choices depend on: parameters, generator, the tokens seen so far, grammar.

    Args:
        params: validated sampling parameters.
        seed: of the generator.
        prompt: token ids of the prompt.
        grammar: what the text must match.
    """

    __slots__ = ("_counts", "_generator", "_ids", "_places", "_point", "grammar", "params")

    def __init__(
        self, params: SamplingParams, seed: int, prompt: Sequence[int], grammar: GrammarMatcher | None = None
    ) -> None:
        self.params = params
        self.grammar = grammar
        self._generator = torch.Generator().manual_seed(seed & _SEED_MASK)
        self._point: float | None = None
        distinct = list(dict.fromkeys(prompt)) if self.penalizes else []
        self._places = {token: place for place, token in enumerate(distinct)}
        self._ids = np.array(distinct, dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.params.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether tokens seen before matter."""
        params = self.params
        return params.repetition_penalty != 1 or bool(params.presence_penalty or params.frequency_penalty)

    @property
    def point(self) -> float:
        """The random number in [0, 1) that decides the next token. It stays the same until a token is accepted."""
        if self._point is None:
            self._point = float(torch.rand(1, generator=self._generator, dtype=torch.float64))
        return self._point

    def seen(self) -> tuple[IntArray, FloatArray]:
        """Distinct token ids of prompt and output, and how often each is in the output."""
        count = len(self._places)
        return self._ids[:count], self._counts[:count]

    def accept(self, token: int) -> None:
        """Take note of the chosen token.

        Raises:
            InferenceError: the grammar does not allow it.
        """
        self._point = None
        if self.penalizes:
            place = self._places.setdefault(token, len(self._places))
            if place >= len(self._ids):
                room = max(len(self._ids), 64)
                self._ids = np.concatenate((self._ids, np.zeros(room, dtype=np.int64)))
                self._counts = np.concatenate((self._counts, np.zeros(room, dtype=np.float32)))
            self._ids[place] = token
            self._counts[place] += 1
        if self.grammar is not None:
            self.grammar.accept(token)


def sample(
    logits: Tensor, samplers: Sequence[Sampler], masks: Mapping[int, GrammarMask] = MappingProxyType({})
) -> list[Sampled]:
    """Choose the next token of each sequence.

    In this order: logit bias, repetition penalty (prompt and output), presence and frequency penalties (output),
    grammar, temperature, top-k, top-p, min-p, the latter as Hugging Face's warpers go.

    Args:
        logits: float32 [sequences, vocab_size]; overwritten.
        samplers: of each row. The caller passes them the chosen token (:meth:`Sampler.accept`).
        masks: the tokens that the grammars of some rows allow.

    Raises:
        InferenceError: a row has logits that are not finite numbers, or none that is allowed.
    """
    check_logits(logits)  # before a grammar hides some of them
    likelihoods = _Likelihoods.of(logits, samplers)
    adjust(logits, samplers)
    if masks:
        apply_masks(logits, list(masks), list(masks.values()))
    if not logits.amax(-1).isfinite().all():
        raise InferenceError("No token is allowed to follow.")
    tokens = [0] * len(samplers)
    greedy = [row for row, sampler in enumerate(samplers) if sampler.greedy]
    if greedy:
        for row, token in zip(greedy, _likeliest(_rows(logits, greedy)), strict=True):
            tokens[row] = token
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawn:
        for row, token in zip(drawn, _draw(_rows(logits, drawn), [samplers[row] for row in drawn]), strict=True):
            tokens[row] = token
    return likelihoods.with_tokens(tokens)


def check_logits(logits: Tensor) -> None:
    """Check logits, float32 [rows, vocab_size].

    Raises:
        InferenceError: one is not finite.
    """
    if not all_finite(logits):
        raise InferenceError("The model's logits are not finite numbers.")


def adjust(logits: Tensor, samplers: Sequence[Sampler]) -> None:
    """Add the logit biases to float32 logits [sequences, vocab_size], and apply the penalties, in place."""
    _apply_bias(logits, samplers)
    _apply_penalties(logits, samplers)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may come next.

    Attributes:
        rows: of which sequences.
        logits: of which the softmax is their probability, [rows, width].
        ids: int64 [rows, width]; None: column ``i`` is token ``i``.
    """

    rows: list[int]
    logits: Tensor
    ids: Tensor | None


def candidates(logits: Tensor, samplers: Sequence[Sampler]) -> Iterator[Candidates]:
    """The tokens that temperature, top-k, top-p and min-p leave; logits [sequences, vocab_size] are overwritten.

    Each row comes once.
    """
    device, params = logits.device, [sampler.params for sampler in samplers]
    temperatures = torch.tensor([max(p.temperature, _COLDEST) for p in params], device=device)
    # From the maximum down, so that no temperature overflows: the likeliest stays at 0, the others sink.
    logits.sub_(logits.amax(-1, keepdim=True)).div_(temperatures.unsqueeze(1))
    cut = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1]
    whole = [row for row, p in enumerate(params) if not p.top_k and p.top_p >= 1]
    if whole:
        yield Candidates(whole, _drop_unlikely(_rows(logits, whole), [params[row] for row in whole]), None)
    width = _NUCLEUS_CANDIDATES
    while cut:
        # The nucleus is nearly always small: look among the likeliest few before ordering the whole vocabulary.
        # How few is each row's own affair: which of two equal logits comes first depends on it.
        widths = [min(max(width, params[row].top_k), logits.shape[1]) for row in cut]
        incomplete = []
        for size in set(widths):
            looked_at = [row for row, its in zip(cut, widths, strict=True) if its == size]
            top, ids, complete = _nucleus(_rows(logits, looked_at), [params[row] for row in looked_at], size)
            places = [place for place, is_complete in enumerate(complete) if is_complete]
            if places:
                rows = [looked_at[place] for place in places]
                yield Candidates(rows, _drop_unlikely(top[places], [params[row] for row in rows]), ids[places])
            incomplete += [row for row, is_complete in zip(looked_at, complete, strict=True) if not is_complete]
        cut = sorted(incomplete)
        width *= 8


def _likeliest(logits: Tensor) -> list[int]:
    """The token with the highest logit of each row, of equal ones the first."""
    # On a CPU numpy finds it some twenty times as fast as torch.
    found = logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(-1)
    tokens: list[int] = found.tolist()
    return tokens


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """A token of each row of logits [sequences, vocab_size]."""
    tokens = torch.empty(len(samplers), dtype=torch.int64, device=logits.device)
    for found in candidates(logits, samplers):
        points = torch.tensor([samplers[row].point for row in found.rows], dtype=torch.float64, device=logits.device)
        index = _invert(found.logits, points)
        tokens[found.rows] = index if found.ids is None else found.ids.gather(1, index.unsqueeze(1)).squeeze(1)
    result: list[int] = tokens.tolist()
    return result


def _rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, in ascending order; not a copy where they are all."""
    return logits if len(rows) == logits.shape[0] else logits[rows]


def _nucleus(logits: Tensor, params: Sequence[SamplingParams], width: int) -> tuple[Tensor, Tensor, list[bool]]:
    """The likeliest ``width`` tokens of each row, those beyond top-k and top-p (arXiv:1904.09751) at -inf.

    Returns:
        Their logits, likeliest first, and ids, each [rows, width]; and of each row whether its nucleus is among them.
    """
    vocab_size, device = logits.shape[1], logits.device
    top, ids = logits.topk(width)
    # A request may name any number, also one that no tensor holds.
    top_k = torch.tensor([min(p.top_k or vocab_size, vocab_size) for p in params], device=device).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device).unsqueeze(1)
    places = torch.arange(width, device=device)
    top = top.masked_fill(places >= top_k, float("-inf"))
    limited = top_k <= width
    total = top.double().logsumexp(-1, keepdim=True)
    if any(not p.top_k or p.top_k > width for p in params):
        total = torch.where(limited, total, logits.logsumexp(-1, keepdim=True).double())
    probabilities = (top.double() - total).exp()
    cumulative = probabilities.cumsum(-1)
    beyond = (cumulative - probabilities >= top_p) & (places > 0)
    complete = limited | (cumulative[:, -1:] >= top_p) | (width == vocab_size)
    # A nucleus of everything is everything: rounding must not cut its end off.
    return top.masked_fill(beyond & (top_p < 1), float("-inf")), ids, complete.squeeze(1).tolist()


def _drop_unlikely(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Tokens less likely than min-p times the likeliest to -inf; the likeliest logit of each row is 0."""
    if not any(p.min_p for p in params):
        return logits
    floors = torch.tensor([p.min_p for p in params], device=logits.device).log().unsqueeze(1)
    return logits.masked_fill_(logits < floors, float("-inf"))


def _invert(logits: Tensor, points: Tensor) -> Tensor:
    """Indices [rows] at which the cumulative probability passes ``points``, float64 [rows] in [0, 1).

    The inverse transform, summed in float64: one number a token, on every device alike. Wide rows are summed in blocks,
    and added up one by one only in the block where the point lies.
    """
    probabilities = logits.softmax(-1)
    width = probabilities.shape[1]
    if width <= 4 * _SUM_BLOCK:
        index, _ = _search(probabilities.double(), points.unsqueeze(1))
        return index.squeeze(1)
    padded = functional.pad(probabilities, (0, -width % _SUM_BLOCK))
    blocks = padded.view(len(padded), -1, _SUM_BLOCK)
    block, rest = _search(blocks.sum(-1, dtype=torch.float64), points.unsqueeze(1))
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, _SUM_BLOCK)).squeeze(1)
    index, _ = _search(inside.double(), rest)
    return (block * _SUM_BLOCK + index).squeeze(1)


def _search(weights: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``points`` [rows, 1], in parts of the whole, lie in ``weights`` [rows, width].

    Returns:
        The index of the weight, and the point in parts of that weight: each [rows, 1].
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    last = (cumulative < total).sum(-1, keepdim=True)  # the last weight that is not 0
    index = torch.searchsorted(cumulative, points * total, right=True).minimum(last)
    weight = weights.gather(1, index)
    before = cumulative.gather(1, index) - weight
    return index, ((points * total - before) / weight).clamp(0, _BELOW_ONE)


def _apply_bias(logits: Tensor, samplers: Sequence[Sampler]) -> None:
    places = [
        (row * logits.shape[1] + token, bias)
        for row, sampler in enumerate(samplers)
        for token, bias in sampler.params.logit_bias
    ]
    if places:
        indices, biases = zip(*places, strict=True)
        added = torch.tensor(biases, dtype=logits.dtype, device=logits.device)
        logits.view(-1).index_add_(0, torch.tensor(indices, device=logits.device), added)


def _apply_penalties(logits: Tensor, samplers: Sequence[Sampler]) -> None:
    """Only the tokens seen are touched, those of all rows at once."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.penalizes]
    if not rows:
        return
    device, width = logits.device, logits.shape[1]
    seen = [samplers[row].seen() for row in rows]
    sizes = [len(ids) for ids, _ in seen]
    flat = np.concatenate([ids + row * width for row, (ids, _) in zip(rows, seen, strict=True)])
    indices = torch.from_numpy(flat).to(device)
    counts = torch.from_numpy(np.concatenate([counts for _, counts in seen])).to(device)

    def spread(name: str) -> Tensor:
        values = np.array([getattr(samplers[row].params, name) for row in rows], dtype=np.float32)
        return torch.from_numpy(np.repeat(values, sizes)).to(device)

    values = logits.view(-1)[indices]
    factor = spread("repetition_penalty").clamp_(min=_LEAST_PENALTY)
    values = torch.where(values > 0, values / factor, values * factor)
    values -= spread("frequency_penalty") * counts + spread("presence_penalty") * (counts > 0)
    logits.view(-1)[indices] = values


class _Likelihoods:
    """The log-probabilities that some rows ask for, taken before anything changes the logits."""

    def __init__(self, wanted: list[int | None], logprobs: Tensor | None) -> None:
        self._wanted = wanted
        self._logprobs = logprobs

    @classmethod
    def of(cls, logits: Tensor, samplers: Sequence[Sampler]) -> "_Likelihoods":
        wanted = [sampler.params.logprobs for sampler in samplers]
        rows = [row for row, count in enumerate(wanted) if count is not None]
        return cls(wanted, logits[rows].log_softmax(-1) if rows else None)

    def with_tokens(self, tokens: list[int]) -> list[Sampled]:
        if self._logprobs is None:
            return [Sampled(token) for token in tokens]
        asked = [row for row, count in enumerate(self._wanted) if count is not None]
        told = likelihoods(self._logprobs, [tokens[row] for row in asked], [self._wanted[row] or 0 for row in asked])
        by_row = dict(zip(asked, told, strict=True))
        return [Sampled(token, by_row.get(row)) for row, token in enumerate(tokens)]


def likelihoods(logprobs: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Likelihood]:
    """Likelihoods at each row of float32 log-probabilities [rows, vocab_size].

    Args:
        logprobs: natural logarithms.
        tokens: the token of each row.
        counts: how many of the likeliest to tell beside it.
    """
    chosen: list[float] = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device).unsqueeze(1))[:, 0].tolist()
    width = min(max(counts), logprobs.shape[1])
    if not width:
        return [Likelihood(logprob) for logprob in chosen]
    values, ids = logprobs.topk(width)
    tops = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        Likelihood(logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for logprob, count, (row_ids, row_values) in zip(chosen, counts, tops, strict=True)
    ]
