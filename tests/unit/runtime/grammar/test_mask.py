"""Masks over logits against a loop over the vocabulary."""

from typing import Any

import numpy as np
import pytest
import torch

from rbee_worker.runtime.grammar.mask import _on_device, _on_host, apply_masks


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 320, 1001])
@pytest.mark.parametrize("apply", [apply_masks, _on_host, _on_device])
def test_masks_over_logits(vocab_size: int, apply: Any):
    rng = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(rng.standard_normal((5, vocab_size), dtype=np.float32))
    rows = [3, 0, 4]
    masks = [rng.integers(-(2**31), 2**31, -(-vocab_size // 32)).astype(np.int32) for _ in rows]
    masks[1][:] = 0
    expected = logits.clone()
    for row, mask in zip(rows, masks, strict=True):
        for token in range(vocab_size):
            if not int(mask[token // 32]) >> token % 32 & 1:
                expected[row, token] = float("-inf")
    apply(logits, rows, masks)
    assert torch.equal(logits, expected)


def test_no_masks_change_nothing():
    logits = torch.ones(2, 4)
    apply_masks(logits, [], [])
    assert torch.equal(logits, torch.ones(2, 4))
