"""Grammar masks over logits."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GrammarMask = npt.NDArray[np.int32]
"""[ceil(vocab_size / 32)]: token ``t`` is allowed where bit ``t % 32`` of word ``t // 32`` is set."""


def apply_masks(logits: Tensor, rows: Sequence[int], masks: Sequence[GrammarMask]) -> None:
    """Set what the masks do not allow to -inf, in place.

    Args:
        logits: float32 [any, vocab_size], on any device.
        rows: those that have a mask, each once.
        masks: of these rows.
    """
    if not rows:
        return
    if logits.device.type == "cpu":
        _on_host(logits, rows, masks)
    else:
        _on_device(logits, rows, masks)


def _on_host(logits: Tensor, rows: Sequence[int], masks: Sequence[GrammarMask]) -> None:
    # numpy unpacks bits several times as fast as torch's shifts do, and row by row nothing is copied.
    forbidden = torch.tensor(float("-inf"))
    for row, mask in zip(rows, masks, strict=True):
        bits = np.unpackbits(mask.astype("<i4", copy=False).view(np.uint8), bitorder="little", count=logits.shape[1])
        torch.where(torch.from_numpy(bits.view(np.bool_)), logits[row], forbidden, out=logits[row])


def _on_device(logits: Tensor, rows: Sequence[int], masks: Sequence[GrammarMask]) -> None:
    # The packed words travel: a thirty-second of the logits' size.
    words = torch.from_numpy(np.stack(masks)).to(logits.device)
    bits = torch.arange(32, device=logits.device, dtype=torch.int32)
    allowed = (words.unsqueeze(-1) >> bits & 1).view(len(rows), -1)[:, : logits.shape[1]].bool()
    index = torch.tensor(rows, device=logits.device)
    logits[index] = logits[index].masked_fill_(~allowed, float("-inf"))
