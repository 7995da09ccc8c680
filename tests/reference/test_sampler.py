"""The sampler against transformers' logits processors and warpers."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rbee_worker.config import SamplingParams
from rbee_worker.errors import InferenceError
from rbee_worker.runtime.engine.sampler import Sampler, adjust, candidates, sample

VOCABULARY = 5000
PROMPT = [3, 17, 3, 999, 4321]

CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top-k": ({"top_k": 40}, [TopKLogitsWarper(40)]),
    "top-k of more than there are": ({"top_k": 10**6}, []),
    "narrow nucleus": ({"top_p": 0.3}, [TopPLogitsWarper(0.3)]),
    "wide nucleus": ({"top_p": 0.995}, [TopPLogitsWarper(0.995)]),
    "min-p": ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
    "repetition penalty": ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
    "all of them": (
        {"repetition_penalty": 1.2, "temperature": 1.4, "top_k": 300, "top_p": 0.9, "min_p": 0.02},
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(300),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ],
    ),
}


def probabilities(logits: Tensor, samplers: list[Sampler]) -> Tensor:
    """Of every token for each row, by what may be drawn."""
    logits = logits.clone()
    adjust(logits, samplers)
    out = torch.zeros_like(logits)
    for found in candidates(logits, samplers):
        shares = found.logits.softmax(-1)
        if found.ids is not None:
            shares = torch.zeros_like(logits[found.rows]).scatter(1, found.ids, shares)
        out[found.rows] = shares
    return out


def choose(logits: Tensor, sampler: Sampler) -> int:
    (chosen,) = sample(logits[None].clone(), [sampler])
    sampler.accept(chosen.token)
    return chosen.token


@pytest.mark.parametrize("scale", [0.5, 3.0], ids=["flat", "peaked"])
def test_probabilities_of_a_mixed_batch(scale: float) -> None:
    logits = torch.randn(len(CASES), VOCABULARY, generator=torch.Generator().manual_seed(5)) * scale
    samplers = [Sampler(SamplingParams(**params), 1, PROMPT) for params, _ in CASES.values()]
    ours = probabilities(logits, samplers)
    for row, (name, (_, processors)) in enumerate(CASES.items()):
        expected = LogitsProcessorList(processors)(torch.tensor([PROMPT]), logits[[row]].clone())[0].softmax(-1)
        torch.testing.assert_close(ours[row], expected, atol=1e-6, rtol=1e-4, msg=name)
        torch.testing.assert_close(probabilities(logits[[row]], [samplers[row]])[0], ours[row], atol=1e-7, rtol=1e-6)


def test_neighbours_do_not_change_a_choice() -> None:
    randomly = random.Random(3)  # noqa: S311  (a test's choices)
    logits = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(4)) * 2
    params = [
        SamplingParams(
            temperature=randomly.choice([0, 0.5, 1.0]),
            top_p=randomly.choice([1.0, 0.5, 0.9999]),
            top_k=randomly.choice([0, 3, 700]),
            min_p=randomly.choice([0.0, 0.1]),
            repetition_penalty=randomly.choice([1.0, 1.5]),
            logit_bias=randomly.choice([(), ((5, 9.0),)]),
        )
        for _ in range(40)
    ]
    together = [Sampler(p, seed, PROMPT) for seed, p in enumerate(params)]
    chosen = [sampled.token for sampled in sample(logits.clone(), together)]
    assert chosen == [choose(logits[row], Sampler(p, row, PROMPT)) for row, p in enumerate(params)]


def test_which_of_two_equal_logits_comes_first_is_no_neighbours_affair() -> None:
    # Sixteen bits make many equal ones, and which of them a search finds depends on how many it looks for.
    logits = torch.randn(20, 20_000, generator=torch.Generator().manual_seed(0)).mul(5).bfloat16().float()
    nucleus, others = SamplingParams(top_p=0.9), (SamplingParams(top_k=300), SamplingParams(top_k=5000))
    for row in range(0, 20, 2):
        pair = logits[row : row + 2]
        alone = sample(pair[:1].clone(), [Sampler(nucleus, row, [])])
        for other in others:
            assert sample(pair.clone(), [Sampler(nucleus, row, []), Sampler(other, 0, [])])[:1] == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_no_choice(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 50)
    logits[1, 7] = bad
    samplers = [Sampler(SamplingParams(temperature=temperature), seed, []) for seed in range(2)]
    with pytest.raises(InferenceError, match="not finite numbers"):
        sample(logits, samplers)


def test_what_a_grammar_forbids_must_be_finite_too() -> None:
    logits = torch.zeros(1, 32)
    logits[0, 7] = float("nan")
    with pytest.raises(InferenceError, match="not finite numbers"):
        sample(logits, [Sampler(SamplingParams(), 0, [])], {0: np.array([1], dtype=np.int32)})
    with pytest.raises(InferenceError, match="No token is allowed"):
        sample(torch.zeros(1, 32), [Sampler(SamplingParams(), 0, [])], {0: np.array([0], dtype=np.int32)})


def test_greedy_and_drawn_rows_keep_their_places() -> None:
    logits = torch.full((4, 2000), -50.0)
    logits[range(4), [3, 1999, 0, 700]] = 50.0
    samplers = [Sampler(SamplingParams(temperature=temperature), 0, []) for temperature in (0, 1, 0, 1)]
    assert [sampled.token for sampled in sample(logits, samplers)] == [3, 1999, 0, 700]


def test_a_bias_may_be_a_whole_number() -> None:
    sampler = Sampler(SamplingParams(temperature=0, logit_bias=((3, 5), (4, 2))), 0, [])
    assert choose(torch.zeros(20), sampler) == 3


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -30.0])
    sampler = Sampler(SamplingParams(), 11, [])
    draws = torch.tensor([choose(logits, sampler) for _ in range(10_000)])
    shares = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.02, rtol=0)


def test_a_draw_of_many_is_the_inverse_of_the_cumulative_probability() -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(6))
    cumulative = logits.double().softmax(0).cumsum(0)
    for seed in range(200):
        sampler = Sampler(SamplingParams(), seed, [])
        point = sampler.point
        token = choose(logits, sampler)
        before = float(cumulative[token - 1]) if token else 0.0
        assert before - 1e-6 <= point <= float(cumulative[token]) + 1e-6


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, temperature=0), 0, [1, 1, 2])
    logits = torch.tensor([5.0, 1.0, 1.0, 1.0])

    def adjusted() -> list[float]:
        rows = logits[None].clone()
        adjust(rows, [sampler])
        return rows[0].tolist()

    assert adjusted() == logits.tolist()
    assert choose(logits, sampler) == 0
    assert adjusted() == [5.0 - 0.25 - 0.5, 1.0, 1.0, 1.0]
    assert choose(logits, sampler) == 0
    assert adjusted() == [5.0 - 2 * 0.25 - 0.5, 1.0, 1.0, 1.0]


def test_every_token_of_a_long_output_counts() -> None:
    sampler = Sampler(SamplingParams(frequency_penalty=1.0), 0, [])
    for token in (*range(200), 7):
        sampler.accept(token)
    ids, counts = sampler.seen()
    assert ids.tolist() == list(range(200))
    assert counts.tolist() == [2.0 if token == 7 else 1.0 for token in range(200)]


def test_a_mask_leaves_what_it_allows() -> None:
    logits = torch.zeros(2, 70)
    logits[0, 5] = 9.0
    allowed = np.zeros(3, dtype=np.int32)
    allowed[1] = 1 << 3
    greedy = Sampler(SamplingParams(temperature=0), 0, [])
    chosen = sample(logits, [greedy, greedy], {0: allowed})
    assert [sampled.token for sampled in chosen] == [35, 0]


def test_likelihoods_are_the_models_own() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    expected = logits.log_softmax(-1)
    biased = SamplingParams(temperature=0, logprobs=2, logit_bias=((7, 100.0),))
    plain = SamplingParams(temperature=0)
    first, second, third = sample(
        logits.clone(), [Sampler(p, 0, []) for p in (biased, plain, SamplingParams(temperature=0, logprobs=0))]
    )
    assert first.token == 7
    assert first.likelihood is not None
    assert first.likelihood.logprob == pytest.approx(float(expected[0, 7]))
    assert [token for token, _ in first.likelihood.top] == expected[0].topk(2).indices.tolist()
    assert second.likelihood is None
    assert third.likelihood is not None
    assert third.likelihood.top == ()
    assert third.likelihood.logprob == pytest.approx(float(expected[2].max()))


def test_same_seed_same_draws_other_seed_others() -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2))

    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(), seed, [])
        return [choose(logits, sampler) for _ in range(20)]

    assert draws(7) == draws(7) != draws(8)
    assert draws(-1) == draws(2**64 - 1)


def test_an_empty_nucleus_keeps_the_likeliest() -> None:
    sampler = Sampler(SamplingParams(top_p=0.0), 3, [])
    assert {choose(torch.tensor([0.0, 0.1, 0.2]), sampler) for _ in range(50)} == {2}


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 5e-324])
def test_the_smallest_temperature_takes_the_likeliest(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), 3, [])
    assert {choose(torch.tensor([1.0, 9.0, 8.0, 2.0]), sampler) for _ in range(20)} == {1}
