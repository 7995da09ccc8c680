"""Ranges and meanings of the settings."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.config import (
    LOGIT_BIAS_RANGE,
    MAX_LOGIT_BIAS,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    RANGES,
    SEED_MAX,
    SEED_MIN,
    EngineConfig,
    GenerationRequest,
    Range,
    SamplingParams,
    ServerConfig,
)
from rbee_worker.errors import InvalidRequest

EDGES = {
    "max_tokens": ([1, 10**9], [0, -1]),
    "temperature": ([0, 2], [-0.01, 2.01, float("nan"), float("inf")]),
    "top_p": ([0, 1], [-0.01, 1.01]),
    "top_k": ([0, 10**9], [-1]),
    "min_p": ([0, 1], [-0.01, 1.01]),
    "repetition_penalty": ([0.001, 2], [0, -1, 2.01]),
    "presence_penalty": ([-2, 2], [-2.01, 2.01]),
    "frequency_penalty": ([-2, 2], [-2.01, 2.01]),
    "logprobs": ([0, 20], [-1, 21]),
    "prompt_logprobs": ([0, 20], [-1, 21]),
}


def test_every_range_has_its_edges_here():
    assert EDGES.keys() == RANGES.keys()


@pytest.mark.parametrize("name", RANGES)
def test_edges(name: str):
    good, bad = EDGES[name]
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(InvalidRequest) as caught:
            SamplingParams(**{name: value})
        assert [field.field for field in caught.value.fields] == [name]
        assert caught.value.fields[0].constraint == str(RANGES[name])


def test_every_bad_field_is_listed():
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(temperature=3, top_p=2, seed=2**64, stop=("",) * (MAX_STOP_SEQUENCES + 1))
    assert [field.field for field in caught.value.fields] == ["temperature", "top_p", "seed", "stop", "stop"]


@pytest.mark.parametrize(
    ("bias", "constraint"),
    [
        (tuple((i, 1.0) for i in range(MAX_LOGIT_BIAS + 1)), f"at most {MAX_LOGIT_BIAS} entries"),
        (((1, 100.5),), f"biases {LOGIT_BIAS_RANGE}"),
        (((1, 0.0), (2, float("nan"))), f"biases {LOGIT_BIAS_RANGE}"),
    ],
)
def test_biases_are_bounded(bias: tuple[tuple[int, float], ...], constraint: str):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(logit_bias=bias)
    assert [(field.field, field.constraint) for field in caught.value.fields] == [("logit_bias", constraint)]


@pytest.mark.parametrize("seed", [SEED_MIN, 0, SEED_MAX])
def test_seeds_of_64_bits(seed: int):
    assert SamplingParams(seed=seed).seed == seed


@pytest.mark.parametrize("seed", [SEED_MIN - 1, SEED_MAX + 1])
def test_seeds_beyond_64_bits(seed: int):
    with pytest.raises(InvalidRequest, match="64 bits"):
        SamplingParams(seed=seed)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_range_is_an_interval(low: float, high: float, value: float):
    assert (value in Range(low=low, high=high)) == (low <= value <= high)
    assert (value in Range(above=low, high=high)) == (low < value <= high)


def test_range_in_words():
    assert str(Range(above=0, high=2)) == "> 0 and <= 2"


def test_text_becomes_messages_only_with_a_system_text():
    sampling = SamplingParams()
    assert GenerationRequest.from_text("hi", system=None, raw=True, sampling=sampling).raw
    plain = GenerationRequest.from_text("hi", system=None, raw=False, sampling=sampling)
    assert (plain.prompt, plain.messages, plain.raw) == ("hi", None, False)
    chat = GenerationRequest.from_text("hi", system="be brief", raw=False, sampling=sampling)
    assert chat.prompt is None
    assert [m["role"] for m in chat.messages or ()] == ["system", "user"]


@pytest.mark.parametrize("kind", [EngineConfig, ServerConfig, SamplingParams])
def test_settings_are_frozen(kind: type):
    settings = kind()
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, field.name, None)


def test_a_stop_string_has_a_length():
    SamplingParams(stop=("x" * MAX_STOP_LENGTH,))
    with pytest.raises(InvalidRequest, match="over 1024 characters") as caught:
        SamplingParams(stop=("a", "x" * (MAX_STOP_LENGTH + 1)))
    assert [field.field for field in caught.value.fields] == ["stop"]
