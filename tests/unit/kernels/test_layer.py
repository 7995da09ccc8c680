"""A layer's parts that do not fit each other are refused before the library sees their addresses."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rbee_worker.kernels.arguments import RotaryTables, Segments, StoredWeights
from rbee_worker.kernels.formats import FORMATS
from rbee_worker.kernels.layer import AttentionParts, KernelLayer, LinearPart, NormParts, StepTokens
from rbee_worker.kernels.library import Kernels
from tests.unit.kernels.matrices import make_matrix

HIDDEN, WIDE, HEADS, KV_HEADS, SIZE, POSITIONS = 32, 64, 4, 2, 8, 20


def part(outputs: int, inputs: int) -> LinearPart:
    return LinearPart(StoredWeights([make_matrix(FORMATS["F16"], outputs, inputs)]), None)


NORMS = NormParts(torch.ones(HIDDEN), torch.ones(HIDDEN), None, None, 1e-6)
TABLES = RotaryTables(torch.ones(POSITIONS, SIZE), torch.zeros(POSITIONS, SIZE), torch.arange(0))
ATTENTION = AttentionParts(
    HEADS,
    SIZE,
    torch.zeros(KV_HEADS, POSITIONS, SIZE),
    torch.zeros(KV_HEADS, POSITIONS, SIZE),
    TABLES,
    None,
    0.0,
    1.0,
    None,
    None,
    None,
)
PARTS: dict[str, Any] = {
    "qkv": part((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN),
    "o": part(HIDDEN, HEADS * SIZE),
    "gate_up": part(2 * WIDE, HIDDEN),
    "down": part(HIDDEN, WIDE),
    "norms": NORMS,
    "attention": ATTENTION,
    "activation": "silu",
    "multiplier": 1.0,
}
ONES = torch.ones(KV_HEADS, POSITIONS, SIZE)
WRONG: dict[str, dict[str, Any]] = {
    "queries, keys and values": {"qkv": part((HEADS + KV_HEADS) * SIZE, HIDDEN)},
    "inputs of o": {"o": part(HIDDEN, HEADS * SIZE + 8)},
    "outputs of o": {"o": part(HIDDEN + 1, HEADS * SIZE)},
    "an odd gate and up": {"gate_up": part(2 * WIDE + 1, HIDDEN)},
    "inputs of gate and up": {"gate_up": part(2 * WIDE, HIDDEN + 1)},
    "down": {"down": part(HIDDEN, WIDE + 1)},
    "a bias": {"down": LinearPart(part(HIDDEN, WIDE).weights, torch.ones(HIDDEN + 1))},
    "a norm": {"norms": replace(NORMS, mlp=torch.ones(HIDDEN - 1))},
    "a norm behind": {"norms": replace(NORMS, mlp_post=torch.ones(HIDDEN).half())},
    "heads": {"attention": replace(ATTENTION, heads=3)},
    "a head's size": {"attention": replace(ATTENTION, head_dim=16)},
    "the cache's dtype": {"attention": replace(ATTENTION, keys=ONES.double(), values=ONES.double())},
    "the cache's strides": {"attention": replace(ATTENTION, keys=ONES.mT.contiguous().mT, values=ONES)},
    "values": {"attention": replace(ATTENTION, values=ONES.half())},
    "fewer values": {"attention": replace(ATTENTION, values=ONES[:, 1:])},
    "the heads' norm": {"attention": replace(ATTENTION, norm=torch.ones(HEADS, SIZE))},
    "tables": {"attention": replace(ATTENTION, tables=RotaryTables(torch.ones(2, 16), torch.ones(2, 16), TABLES.rows))},
    "sinks": {"attention": replace(ATTENTION, sinks=torch.ones(HEADS + 1))},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_parts_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    KernelLayer(**PARTS)
    with pytest.raises(ValueError):
        KernelLayer(**PARTS | wrong)


def test_tokens_that_do_not_fit_are_refused(kernels: Kernels) -> None:
    layer, segments, two = KernelLayer(**PARTS), Segments([(0, 2, 0, [(0, 16)])]), torch.arange(2)
    tokens = StepTokens(segments, two, two)
    for wrong in (torch.arange(3), two.int(), torch.arange(4)[::2]):
        for rows, slots in ((wrong, two), (two, wrong)):
            with pytest.raises(ValueError):
                StepTokens(segments, rows, slots)
    hidden, addend, between = torch.ones(2, HIDDEN), torch.ones(2, HIDDEN), torch.ones(2 * layer.floats)
    kernels.layer(layer, tokens, hidden, addend, between, pending=False)
    for arguments in (
        (hidden[:1], addend, between),
        (hidden, addend.double(), between),
        (hidden.T.contiguous().T, addend, between),
        (hidden, addend, between[:-1]),
        (hidden, addend, torch.ones(4 * layer.floats)[::2]),
    ):
        with pytest.raises(ValueError):
            kernels.layer(layer, tokens, *arguments, pending=False)
