import math

import pytest
import torch

from rbee_worker.runtime.attention import attend


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("tokens", "before"), [(1, 0), (1, 37), (5, 0), (5, 40), (300, 0), (300, 61)])
def test_every_query_sees_its_past_and_itself(tokens: int, before: int, kv_heads: int) -> None:
    heads, dim, positions = 6, 16, before + tokens
    generator = torch.Generator().manual_seed(tokens)
    queries = torch.randn(tokens, heads, dim, generator=generator)
    keys, values = torch.randn(2, kv_heads, positions, dim, generator=generator)
    expected = torch.zeros(tokens, heads, dim, dtype=torch.float64)
    for token in range(tokens):
        seen = before + token + 1
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = keys[shared, :seen].double() @ queries[token, head].double() / math.sqrt(dim)
            expected[token, head] = scores.softmax(0) @ values[shared, :seen].double()
    torch.testing.assert_close(attend(queries, keys, values).double(), expected.reshape(tokens, -1), atol=1e-5, rtol=0)
