"""GrammarMask: which tokens a grammar allows next; and its use on logits."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GrammarMask = npt.NDArray[np.int32]
"""int32 [ceil(vocab_size / 32)]: token ``t`` is allowed where bit ``t % 32`` of word ``t // 32`` is set."""


def apply_masks(logits: Tensor, rows: Sequence[int], masks: Sequence[GrammarMask]) -> None:
    """Set the logits of tokens that are not allowed to -inf, in place.

    Args:
        logits: float32 [any, vocab_size], on any device.
        rows: the rows that have a mask, each once.
        masks: the masks of these rows, in the same order.
    """
    if not rows:
        return
    if logits.device.type == "cpu":
        _on_host(logits, rows, masks)
    else:
        _on_device(logits, rows, masks)


def _on_host(logits: Tensor, rows: Sequence[int], masks: Sequence[GrammarMask]) -> None:
    # numpy unpacks bits several times as fast as shifts in torch. Row by row, no logits are copied.
    forbidden = torch.tensor(float("-inf"))
    for row, mask in zip(rows, masks, strict=True):
        bits = np.unpackbits(mask.astype("<i4", copy=False).view(np.uint8), bitorder="little", count=logits.shape[1])
        torch.where(torch.from_numpy(bits.view(np.bool_)), logits[row], forbidden, out=logits[row])


def _on_device(logits: Tensor, rows: Sequence[int], masks: Sequence[GrammarMask]) -> None:
    # The masks are copied to the device packed: 1/32 of the logits' size.
    words = torch.from_numpy(np.stack(masks)).to(logits.device)
    bits = torch.arange(32, device=logits.device, dtype=torch.int32)
    allowed = (words.unsqueeze(-1) >> bits & 1).view(len(rows), -1)[:, : logits.shape[1]].bool()
    index = torch.tensor(rows, device=logits.device)
    logits[index] = logits[index].masked_fill_(~allowed, float("-inf"))
