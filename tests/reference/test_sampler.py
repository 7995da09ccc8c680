"""The sampler against transformers' logits processors and warpers."""

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rbee_worker.config import SamplingParams
from rbee_worker.runtime.sampler import Sampler

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


@pytest.mark.parametrize("scale", [0.5, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(("params", "processors"), CASES.values(), ids=CASES.keys())
def test_probabilities(params: dict[str, Any], processors: list[Any], scale: float) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(5)) * scale
    expected = LogitsProcessorList(processors)(torch.tensor([PROMPT]), logits[None].clone())[0].softmax(-1)
    sampler = Sampler(SamplingParams(**params), 1, PROMPT, VOCABULARY)
    candidates, ids = sampler.candidates(logits.clone())
    ours = torch.zeros(VOCABULARY)
    ours[torch.arange(VOCABULARY) if ids is None else ids] = candidates.softmax(-1)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -30.0])
    sampler = Sampler(SamplingParams(), 11, [], 4)
    draws = torch.tensor([sampler.sample(logits.clone()) for _ in range(20_000)])
    shares = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.015, rtol=0)


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, temperature=0), 0, [1, 1, 2], 4)
    logits = torch.tensor([5.0, 1.0, 1.0, 1.0])
    assert torch.equal(sampler.penalize(logits), logits)
    assert sampler.sample(logits) == 0
    assert sampler.penalize(logits).tolist() == [5.0 - 0.25 - 0.5, 1.0, 1.0, 1.0]
    assert sampler.sample(logits) == 0
    assert sampler.penalize(logits).tolist() == [5.0 - 2 * 0.25 - 0.5, 1.0, 1.0, 1.0]


def test_same_seed_same_draws_other_seed_others() -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2))

    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(), seed, [], VOCABULARY)
        return [sampler.sample(logits.clone()) for _ in range(20)]

    assert draws(7) == draws(7) != draws(8)
    assert draws(-1) == draws(2**64 - 1)


def test_an_empty_nucleus_keeps_the_likeliest() -> None:
    sampler = Sampler(SamplingParams(top_p=0.0), 3, [], 3)
    assert {sampler.sample(torch.tensor([0.0, 0.1, 0.2])) for _ in range(50)} == {2}


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 5e-324])
def test_the_smallest_temperature_takes_the_likeliest(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), 3, [], 4)
    assert {sampler.sample(torch.tensor([1.0, 9.0, 8.0, 2.0])) for _ in range(20)} == {1}
