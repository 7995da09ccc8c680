"""Mixture of experts: a router chooses a few MLPs for each token."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rbee_worker.kernels.library import Kernels
from rbee_worker.runtime.architecture.config import Activation, ExpertsConfig
from rbee_worker.runtime.model.layers import gated
from rbee_worker.runtime.model.linear.linear import Linear


class Experts:
    """The router and the experts. An expert runs once a step, on all the tokens that chose it.

    The router's weights are float32, whatever form the experts' matrices have. Of the other experts' matrices no byte
    is touched.
    """

    __slots__ = ("_active", "_gated", "_renormalise", "experts", "nbytes", "router")

    def __init__(
        self,
        activation: Activation,
        config: ExpertsConfig,
        router: Linear,
        experts: Sequence[Mapping[str, Linear]],
        *,
        kernels: Kernels | None = None,
    ) -> None:
        """``router``: of float32; ``experts``: the matrices ``gate_up`` and ``down`` of each."""
        self.experts = [(matrices["gate_up"], matrices["down"]) for matrices in experts]
        self.router = router
        self._active, self._renormalise = config.active, config.renormalise
        self._gated: Callable[[Tensor], Tensor] = gated(activation, kernels)
        if config.clamp is not None:
            self._gated = functools.partial(_clamped, limit=config.clamp, alpha=config.alpha)
        self.nbytes = sum(gate_up.nbytes + down.nbytes for gate_up, down in self.experts)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden_size] to the same shape and dtype."""
        weights, chosen = self._route(x)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        if x.shape[0] == 1:
            for number, weight in sorted(zip(chosen[0].tolist(), weights[0].tolist(), strict=True)):
                out += self._expert(number, x) * weight
            return out
        places: dict[int, list[int]] = {}
        for place, number in enumerate(chosen.flatten().tolist()):
            places.setdefault(number, []).append(place)
        flat = weights.flatten()
        for number in sorted(places):
            chosen_by = torch.tensor(places[number], device=x.device)
            rows = chosen_by // self._active
            out.index_add_(0, rows, self._expert(number, x[rows]) * flat[chosen_by].unsqueeze(-1))
        return out

    def _expert(self, number: int, x: Tensor) -> Tensor:
        gate_up, down = self.experts[number]
        return down(self._gated(gate_up(x)))

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of each token's experts and their numbers: float32 and int64, each [tokens, active]."""
        weights, chosen = self.router(x.float()).softmax(-1).topk(self._active, dim=-1)
        return weights / weights.sum(-1, keepdim=True) if self._renormalise else weights, chosen


def _clamped(gate_up: Tensor, limit: float, alpha: float) -> Tensor:
    """gpt-oss's activation: ``gate * sigmoid(alpha * gate) * (up + 1)``; gate <= limit, -limit <= up <= limit."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)
