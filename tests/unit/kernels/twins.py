"""What the operators compute, in float64 and one plain formula each."""

import math

import torch
from torch import Tensor


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The last tokens' queries [tokens, heads, head_dim] over their sequence [kv_heads, positions, head_dim]."""
    tokens, heads, _ = queries.shape
    kv_heads, length, _ = keys.shape
    keys, values = (x.double().repeat_interleave(heads // kv_heads, 0) for x in (keys, values))
    scores = torch.einsum("thd,hpd->htp", queries.double(), keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    own, position = torch.arange(length - tokens, length)[:, None], torch.arange(length)
    seen = position <= own
    if window is not None:
        seen &= position > own - window
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(heads, tokens, 1)), dim=-1)
    weights = scores.softmax(-1)[..., :length]
    return torch.einsum("htp,hpd->thd", weights, values).flatten(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """The first dimensions of x [tokens, heads, head_dim], by tables [tokens, rotary_dim] whose sines have signs."""
    size = cos.shape[-1]
    turned, rest = x[..., :size].double(), x[..., size:].double()
    swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else turned.roll(size // 2, -1)
    return torch.cat((turned * cos[:, None].double() + swapped * sin[:, None].double(), rest), dim=-1)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu-tanh" else "none") * up
