"""Attention of a step's new tokens over the cached keys and values of their sequences.

:class:`RunAttention` reads each run of the cache in place and merges what several runs give; it is for CPUs.
:class:`GatherAttention` collects a sequence's positions first; it runs on every device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.runtime.kv_cache import SequenceCache

_QUERY_BLOCK = 128
"""Queries that go through one kernel call. A block looks at the keys up to its own last position, so that little
is computed only to be masked, and the mask stays small however long the context is."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A sequence's share of a batch: ``count`` tokens from row ``start``, behind what its cache holds.

    ``outputs``: of how many of its last tokens the logits are wanted.
    """

    cache: SequenceCache
    start: int
    count: int
    outputs: int = 1


class Attention(Protocol):
    """One step's attention, made once and called for every layer."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Causal grouped-query attention.

        Args:
            queries: [tokens, heads, head_dim], of all sequences side by side.
            keys: a layer's cache, [kv_heads, positions, head_dim], the new tokens' included.
            values: as keys.

        Returns:
            [tokens, heads * head_dim].
        """


def attention_for(segments: Sequence[Segment], dtype: torch.dtype, device: torch.device) -> Attention:
    """The attention that suits a device."""
    return RunAttention(segments, dtype) if device.type == "cpu" else GatherAttention(segments, device)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Queries ``rows`` against the positions from ``begin`` to ``end`` of the pool.

    ``mask``: float [queries, positions], 0 or -inf; None: every query sees all.
    """

    rows: slice | Tensor
    begin: int
    end: int
    mask: Tensor | None


class RunAttention:
    """Reads each cached key and value once, where it lies.

    A query whose sequence lies in one run goes through one kernel call. Where there are several, each call also gives
    the logarithm of its sum of exponentials, by which the parts are weighted (arXiv:1805.02867 for the sum in parts).
    Single queries of several sequences that share a run, such as a common prefix, go through it together.
    """

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype) -> None:
        self._whole: list[_Piece] = []
        self._parts: list[_Piece] = []
        shared: dict[tuple[int, int], list[int]] = {}
        for segment in segments:
            runs = segment.cache.runs(segment.count)
            if segment.count == 1 and len(runs) > 1:
                for run in runs:
                    shared.setdefault(run, []).append(segment.start)
                continue
            for begin in range(0, segment.count, _QUERY_BLOCK):
                count = min(_QUERY_BLOCK, segment.count - begin)
                pieces = _pieces(runs, segment.start + begin, segment.cache.length + begin, count, dtype)
                (self._parts if len(pieces) > 1 else self._whole).extend(pieces)
        for (begin, end), rows in shared.items():
            self._parts.append(_Piece(torch.tensor(rows), begin, end, None))

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See :class:`Attention`."""
        if len(self._whole) == 1 and not self._parts:
            return _attend(queries, keys, values, self._whole[0]).flatten(1)
        out = torch.empty_like(queries)
        if self._parts:
            self._merge(out, queries, keys, values)
        for piece in self._whole:
            out[piece.rows] = _attend(queries[piece.rows], keys, values, piece)
        return out.flatten(1)

    def _merge(self, out: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        total = torch.zeros(queries.shape, dtype=torch.float32)
        weight = torch.full((*queries.shape[:2], 1), float("-inf"))
        for piece in self._parts:
            part, part_weight = _attend_part(queries[piece.rows], keys, values, piece)
            before = weight[piece.rows]
            after = torch.logaddexp(before, part_weight)
            total[piece.rows] = total[piece.rows] * (before - after).exp() + part * (part_weight - after).exp()
            weight[piece.rows] = after
        out.copy_(total)


class GatherAttention:
    """Collects each sequence's keys and values side by side before it looks at them."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._segments = [
            (
                slice(segment.start, segment.start + segment.count),
                torch.cat([torch.arange(*run, device=device) for run in segment.cache.runs(segment.count)]),
                torch.ones(segment.count, segment.cache.length + segment.count, dtype=torch.bool, device=device).tril_(
                    segment.cache.length
                ),
            )
            for segment in segments
        ]

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See :class:`Attention`."""
        out = torch.empty_like(queries)
        for rows, positions, mask in self._segments:
            attended = functional.scaled_dot_product_attention(
                queries[rows].transpose(0, 1).unsqueeze(0),
                keys[:, positions].unsqueeze(0),
                values[:, positions].unsqueeze(0),
                attn_mask=mask,
                enable_gqa=keys.shape[0] != queries.shape[1],
            )
            out[rows] = attended.squeeze(0).transpose(0, 1)
        return out.flatten(1)


def _pieces(runs: Sequence[tuple[int, int]], row: int, position: int, count: int, dtype: torch.dtype) -> list[_Piece]:
    """What ``count`` queries from ``row`` look at, the first of them at ``position`` of its sequence."""
    pieces = []
    before = 0  # positions in earlier runs
    for begin, end in runs:
        size = end - begin
        skipped = max(before - position, 0)  # queries that stand before this run
        if skipped >= count:
            break
        rows = slice(row + skipped, row + count)
        visible = min(position + count - before, size)
        offset = position + skipped - before  # positions of this run that the first of them has behind it
        masked = visible > offset + 1
        mask = _causal_mask(count - skipped, visible, offset, dtype) if masked else None
        pieces.append(_Piece(rows, begin, begin + visible, mask))
        before += size
    return pieces


def _causal_mask(queries: int, positions: int, offset: int, dtype: torch.dtype) -> Tensor:
    return torch.full((queries, positions), float("-inf"), dtype=dtype).triu_(offset + 1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, piece: _Piece) -> Tensor:
    """[tokens, heads, head_dim] as the queries."""
    tokens, heads, head_dim = queries.shape
    kv_heads = keys.shape[0]
    keys, values = keys[:, piece.begin : piece.end].unsqueeze(0), values[:, piece.begin : piece.end].unsqueeze(0)
    if tokens == 1:
        # The heads that share keys become the query rows of one small product: nothing is repeated.
        folded = queries.view(1, kv_heads, heads // kv_heads, head_dim)
        return functional.scaled_dot_product_attention(folded, keys, values).view(1, heads, head_dim)
    causal = piece.mask is not None and tokens == keys.shape[2]
    out = functional.scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=None if causal else piece.mask,
        is_causal=causal,
        enable_gqa=kv_heads != heads,
    )
    return out.squeeze(0).transpose(0, 1)


def _attend_part(queries: Tensor, keys: Tensor, values: Tensor, piece: _Piece) -> tuple[Tensor, Tensor]:
    """As :func:`_attend` in float32, with the logarithm of the sum of exponentials: [tokens, heads, 1]."""
    tokens, heads, head_dim = queries.shape
    kv_heads = keys.shape[0]
    keys, values = keys[:, piece.begin : piece.end].unsqueeze(0), values[:, piece.begin : piece.end].unsqueeze(0)
    # The only kernel of torch that tells the logarithm on a CPU.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    if piece.mask is None:
        group = heads // kv_heads
        folded = queries.view(tokens, kv_heads, group, head_dim).transpose(0, 1).reshape(1, kv_heads, -1, head_dim)
        out, weight = kernel(folded, keys, values)
        out = out.view(kv_heads, tokens, group, head_dim).transpose(0, 1).reshape(tokens, heads, head_dim)
        weight = weight.view(kv_heads, tokens, group).transpose(0, 1).reshape(tokens, heads, 1)
    else:
        out, weight = kernel(queries.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=piece.mask)
        out, weight = out.squeeze(0).transpose(0, 1), weight.squeeze(0).transpose(0, 1).unsqueeze(-1)
    return out.float(), weight
