"""Activations, value by value."""

import math
from collections.abc import Callable

import pytest
import torch

from rbee_worker.runtime.model.layers import gated


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: float) -> float:
    return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize(("name", "activation"), [("silu", silu), ("gelu", gelu), ("gelu-tanh", gelu_tanh)])
def test_gated_activations(name: str, activation: Callable[[float], float]) -> None:
    gates, ups = [-3.0, -1.0, 0.5, 2.0], [1.0, -2.0, 3.0, 4.0]
    expected = [activation(gate) * up for gate, up in zip(gates, ups, strict=True)]
    rows = torch.tensor([gates + ups], dtype=torch.float64)
    assert gated(name)(rows).tolist()[0] == pytest.approx(expected, rel=1e-9)  # type: ignore[arg-type]
