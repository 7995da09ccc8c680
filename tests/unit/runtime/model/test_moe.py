"""Mixtures of experts: what they compute, and for whom."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.kernels.library import Kernels, cpu_kernels, missing_reason
from rbee_worker.runtime.architecture.config import ExpertsConfig
from rbee_worker.runtime.model.linear.linear import DenseLinear, Linear
from rbee_worker.runtime.model.linear.stored import StoredLinear, plain_matrix
from rbee_worker.runtime.model.moe import Experts
from tests.unit.kernels.matrices import BLOCK_FORMATS, make_matrix

HIDDEN, INNER, COUNT, ACTIVE = 256, 256, 8, 3


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def experts_of(
    router: Linear, matrices: list[dict[str, Linear]], kernels: Kernels | None = None, *, renormalise: bool = True
) -> Experts:
    config = ExpertsConfig(count=COUNT, active=ACTIVE, intermediate_size=INNER, renormalise=renormalise)
    return Experts("silu", config, router, matrices, kernels=kernels)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 9])
def test_each_token_goes_through_its_experts(tokens: int, renormalise: bool) -> None:
    gate_up, down = numbers(COUNT, 2 * INNER, HIDDEN, seed=0) * 0.1, numbers(COUNT, HIDDEN, INNER, seed=1) * 0.1
    router, bias, x = numbers(COUNT, HIDDEN, seed=2), numbers(COUNT, seed=3), numbers(tokens, HIDDEN, seed=4)
    matrices: list[dict[str, Linear]] = [
        {"gate_up": DenseLinear(gate_up[number], None), "down": DenseLinear(down[number], None)}
        for number in range(COUNT)
    ]
    found = experts_of(DenseLinear(router, bias), matrices, renormalise=renormalise)(x)
    assert found.shape == x.shape
    for row, token in zip(found, x.double(), strict=True):
        weights, chosen = (router.double() @ token + bias).softmax(0).topk(ACTIVE)
        expected = torch.zeros(HIDDEN, dtype=torch.float64)
        for weight, number in zip(weights / weights.sum() if renormalise else weights, chosen.tolist(), strict=True):
            gate, up = (gate_up[number].double() @ token).chunk(2)
            expected += weight * (down[number].double() @ (functional.silu(gate) * up))
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.cpu_forms
@pytest.mark.skipif(cpu_kernels() is None, reason=f"the kernels do not run here: {missing_reason()}")
@pytest.mark.parametrize("stored", ["F16", "BF16", *(form.name for form in BLOCK_FORMATS)])
def test_a_token_has_the_same_bits_alone_and_beside_others(stored: str) -> None:
    kernels = cpu_kernels()
    assert kernels is not None
    blocks = {form.name: form for form in BLOCK_FORMATS}

    def linear(rows: int, columns: int, seed: int) -> StoredLinear:
        if stored in blocks:
            return StoredLinear(kernels, [make_matrix(blocks[stored], rows, columns, seed)], None)
        dtype = torch.float16 if stored == "F16" else torch.bfloat16
        return StoredLinear(kernels, [plain_matrix((numbers(rows, columns, seed=seed) * 0.1).to(dtype))], None)

    matrices: list[dict[str, Linear]] = [
        {"gate_up": linear(2 * INNER, HIDDEN, number), "down": linear(HIDDEN, INNER, COUNT + number)}
        for number in range(COUNT)
    ]
    experts = experts_of(
        StoredLinear(kernels, [plain_matrix(numbers(COUNT, HIDDEN, seed=90))], None), matrices, kernels
    )
    x = numbers(9, HIDDEN, seed=91)
    alone = torch.cat([experts(x[row : row + 1]) for row in range(9)])
    for tokens in range(2, 10):
        assert torch.equal(experts(x[:tokens]), alone[:tokens])
    assert torch.equal(experts(x.flip(0)).flip(0), alone)
