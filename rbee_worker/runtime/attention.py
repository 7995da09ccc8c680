"""Attention of one sequence's new tokens over its cached keys and values."""

import torch
from torch import Tensor
from torch.nn import functional

_QUERY_BLOCK = 128
"""Queries that go through one kernel call. A block looks at the keys up to its own last position, so that little
is computed only to be masked, and the mask stays small however long the context is."""


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal grouped-query attention.

    Args:
        queries: [tokens, heads, head_dim], the last ``tokens`` positions of the sequence.
        keys: [kv_heads, positions, head_dim], positions >= tokens.
        values: as keys.

    Returns:
        [tokens, heads * head_dim].
    """
    tokens, heads, head_dim = queries.shape
    kv_heads, positions, _ = keys.shape
    if tokens == 1:
        # The heads that share keys become the query rows of one small product: nothing is repeated.
        folded = queries.view(1, kv_heads, heads // kv_heads, head_dim)
        out = functional.scaled_dot_product_attention(folded, keys.unsqueeze(0), values.unsqueeze(0))
        return out.view(1, heads * head_dim)
    before = positions - tokens
    blocks = [
        _attend_block(queries[begin : begin + _QUERY_BLOCK], keys, values, before + begin)
        for begin in range(0, tokens, _QUERY_BLOCK)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _attend_block(queries: Tensor, keys: Tensor, values: Tensor, before: int) -> Tensor:
    """As :func:`attend`, for queries that stand behind ``before`` positions."""
    tokens, heads, head_dim = queries.shape
    end = before + tokens
    mask = torch.ones(tokens, end, dtype=torch.bool, device=queries.device).tril_(before) if before else None
    out = functional.scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),
        keys[:, :end].unsqueeze(0),
        values[:, :end].unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=keys.shape[0] != heads,
    )
    return out.squeeze(0).transpose(0, 1).reshape(tokens, heads * head_dim)
