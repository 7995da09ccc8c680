"""Attention of one sequence's new tokens over its cached keys and values."""

import torch
from torch import Tensor
from torch.nn import functional


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
    mask = None
    if positions > tokens:
        mask = torch.ones(tokens, positions, dtype=torch.bool, device=queries.device).tril_(positions - tokens)
    out = functional.scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=kv_heads != heads,
    )
    return out.squeeze(0).transpose(0, 1).reshape(tokens, heads * head_dim)
