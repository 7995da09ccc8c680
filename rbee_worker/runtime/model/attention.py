"""Attention of a step's new tokens over the cached keys and values of their sequences.

:class:`RunAttention` reads each run of the cache in place and merges the results of several runs. It is for CPUs.
:class:`GatherAttention` first collects a sequence's positions. It runs on every device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.runtime.cache.kv_cache import SequenceCache

_QUERY_BLOCK = 128
"""Queries of one kernel call. They look at the keys up to their own last position, so little is computed and then
masked, and the mask stays small however long the context is."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A sequence's share of a batch: ``count`` tokens from row ``start`` on, which follow what its cache holds.

    ``outputs``: for how many of its last tokens the logits are wanted.
    """

    cache: SequenceCache
    start: int
    count: int
    outputs: int = 1


@dataclass(frozen=True, slots=True)
class Scores:
    """What is special about a layer's attention scores.

    Attributes:
        window: a query sees this many positions, its own included; None: all before it.
        scale: of the products of queries and keys; None: ``head_dim ** -0.5``.
        softcap: scores become ``cap * tanh(score / cap)``.
        sinks: float32 [heads], one more score for each head. It takes a share of the softmax and has no value.
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


PLAIN = Scores()


class Attention(Protocol):
    """One step's attention, made once and called for every layer."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, scores: Scores = PLAIN) -> Tensor:
        """Causal grouped-query attention.

        Args:
            queries: [tokens, heads, head_dim], of all sequences side by side.
            keys: a layer's cache, [kv_heads, positions, head_dim], the new tokens' included, of any floating dtype.
            values: as keys.
            scores: what is special about the layer.

        Returns:
            [tokens, heads * head_dim].
        """


def attention_for(segments: Sequence[Segment], dtype: torch.dtype, device: torch.device) -> Attention:
    """The attention that suits a device."""
    return RunAttention(segments, dtype) if device.type == "cpu" else GatherAttention(segments, device)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Queries ``rows`` against the positions from ``begin`` to ``end`` of the pool.

    ``mask``: float [queries, positions], 0 or -inf; None: every query sees all. ``causal``: the mask is no more than
    each query's own past, and the last of them sees all.
    """

    rows: slice | Tensor
    begin: int
    end: int
    mask: Tensor | None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    """A step's pieces. A ``whole`` piece is all that its queries see; ``parts`` must be merged."""

    whole: list[_Piece]
    parts: list[_Piece]


class RunAttention:
    """Reads each cached key and value once, where it lies.

    A sequence that lies in one run takes one kernel call. With several runs, each call also gives the logarithm of its
    sum of exponentials, and the parts are weighted by it (arXiv:1805.02867 for the sum in parts). Sequences that decode
    and share a run, such as a common prefix, read it in one call. A window hides the positions before it. The plan for
    a window is made once in a step.
    """

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype) -> None:
        self._segments, self._dtype = segments, dtype
        self._plans: dict[int | None, _Plan] = {}

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, scores: Scores = PLAIN) -> Tensor:
        """See :class:`Attention`."""
        plan = self._plans.get(scores.window) or self._planned(scores.window)
        if scores.softcap is not None or scores.sinks is not None:
            out = torch.empty_like(queries)
            self._merge(out, queries, keys, values, scores, pieces=[*plan.parts, *plan.whole])
            return out.flatten(1)
        if len(plan.whole) == 1 and not plan.parts:
            return _attend(queries, keys, values, plan.whole[0], scores.scale).flatten(1)
        out = torch.empty_like(queries)
        if plan.parts:
            self._merge(out, queries, keys, values, scores, pieces=plan.parts)
        for piece in plan.whole:
            out[piece.rows] = _attend(queries[piece.rows], keys, values, piece, scores.scale)
        return out.flatten(1)

    def _planned(self, window: int | None) -> _Plan:
        plan = self._plans[window] = _Plan([], [])
        shared: dict[tuple[int, int], list[int]] = {}
        for segment in self._segments:
            position, runs = segment.cache.length, segment.cache.runs(segment.count)
            if segment.count == 1 and (seen := _seen_by_one(runs, position, window)) and len(seen) > 1:
                for run in seen:
                    shared.setdefault(run, []).append(segment.start)
                continue
            for begin in range(0, segment.count, _QUERY_BLOCK):
                count = min(_QUERY_BLOCK, segment.count - begin)
                pieces = _pieces(runs, segment.start + begin, position + begin, count, self._dtype, window=window)
                (plan.parts if len(pieces) > 1 else plan.whole).extend(pieces)
        for (begin, end), rows in shared.items():
            plan.parts.append(_Piece(torch.tensor(rows), begin, end, None))
        return plan

    def _merge(
        self, out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scores: Scores, *, pieces: Sequence[_Piece]
    ) -> None:
        total = torch.zeros(queries.shape, dtype=torch.float32)
        weight = torch.full((*queries.shape[:2], 1), float("-inf"))
        for piece in pieces:
            part, part_weight = _attend_part(queries[piece.rows], keys, values, piece, scores)
            before = weight[piece.rows]
            after = torch.logaddexp(before, part_weight)
            total[piece.rows] = total[piece.rows] * (before - after).exp() + part * (part_weight - after).exp()
            weight[piece.rows] = after
        out.copy_(_without_sinks(total, weight, scores.sinks))


class GatherAttention:
    """Copies each sequence's keys and values side by side, then attends to them."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._segments, self._device = segments, device
        self._plans: dict[int | None, list[tuple[slice, Tensor, Tensor]]] = {}

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, scores: Scores = PLAIN) -> Tensor:
        """See :class:`Attention`."""
        out = torch.empty_like(queries)
        for rows, positions, mask in self._plans.get(scores.window) or self._planned(scores.window):
            if scores.softcap is not None or scores.sinks is not None:
                part, weight = _attend_exactly(queries[rows], keys[:, positions], values[:, positions], mask, scores)
                out[rows] = _without_sinks(part, weight, scores.sinks).to(out.dtype)
                continue
            attended = functional.scaled_dot_product_attention(
                queries[rows].transpose(0, 1).unsqueeze(0),
                keys[:, positions].unsqueeze(0).to(queries.dtype),
                values[:, positions].unsqueeze(0).to(queries.dtype),
                attn_mask=mask,
                scale=scores.scale,
                enable_gqa=keys.shape[0] != queries.shape[1],
            )
            out[rows] = attended.squeeze(0).transpose(0, 1)
        return out.flatten(1)

    def _planned(self, window: int | None) -> list[tuple[slice, Tensor, Tensor]]:
        """For each segment: its rows, where its positions lie, and which of them each query sees."""
        plan = self._plans[window] = []
        for segment in self._segments:
            length, count = segment.cache.length, segment.count
            lies = torch.cat([torch.arange(*run, device=self._device) for run in segment.cache.runs(count)])
            skipped = max(length - window + 1, 0) if window is not None else 0
            seen = torch.ones(count, length + count - skipped, dtype=torch.bool, device=self._device)
            seen.tril_(length - skipped)
            if window is not None:
                seen.triu_(length - skipped - window + 1)
            plan.append((slice(segment.start, segment.start + count), lies[skipped:], seen))
        return plan


def _seen_by_one(runs: Sequence[tuple[int, int]], position: int, window: int | None) -> list[tuple[int, int]]:
    """The runs of a sequence, cut to what the query at its last ``position`` sees."""
    if window is None:
        return list(runs)
    hidden, seen = max(position - window + 1, 0), []
    for begin, end in runs:
        if hidden < end - begin:
            seen.append((begin + hidden, end))
        hidden = max(hidden - (end - begin), 0)
    return seen


def _pieces(
    runs: Sequence[tuple[int, int]], row: int, position: int, count: int, dtype: torch.dtype, *, window: int | None
) -> list[_Piece]:
    """What ``count`` queries from ``row`` on look at. The first of them is at ``position`` of its sequence."""
    pieces = []
    before = 0  # positions in earlier runs
    for begin, end in runs:
        size = end - begin
        first = max(before - position, 0)  # the queries before it stand before this run
        last = count if window is None else min(count, before + size + window - 1 - position)  # and these see no more
        if first >= count:
            break
        if first < last:
            hidden = 0 if window is None else max(position + first - window + 1 - before, 0)
            visible = min(position + last - before, size)
            offset = position + first - before - hidden  # what the first of them has behind it here
            shape = (last - first, visible - hidden)
            cut = window is not None and shape[0] - 1 + offset >= window
            masked = shape[1] > offset + 1 or cut
            mask = _mask(*shape, offset, dtype, window if cut else None) if masked else None
            causal = masked and not cut and shape[0] == shape[1]
            rows = slice(row + first, row + last)
            pieces.append(_Piece(rows, begin + hidden, begin + visible, mask, causal))
        before += size
    return pieces


def _mask(queries: int, positions: int, offset: int, dtype: torch.dtype, window: int | None) -> Tensor:
    hidden = torch.full((queries, positions), float("-inf"), dtype=dtype)
    mask = hidden.triu(offset + 1)
    return mask if window is None else mask + hidden.tril(offset - window)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, piece: _Piece, scale: float | None) -> Tensor:
    """[tokens, heads, head_dim] as the queries."""
    tokens, heads, head_dim = queries.shape
    kv_heads = keys.shape[0]
    keys, values = (part.unsqueeze(0) for part in _of_piece(queries, keys, values, piece))
    if tokens == 1:
        # The heads that share keys become the query rows of one small product, so keys are not repeated.
        folded = queries.view(1, kv_heads, heads // kv_heads, head_dim)
        return functional.scaled_dot_product_attention(folded, keys, values, scale=scale).view(1, heads, head_dim)
    out = functional.scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=None if piece.causal else piece.mask,
        is_causal=piece.causal,
        scale=scale,
        enable_gqa=kv_heads != heads,
    )
    return out.squeeze(0).transpose(0, 1)


def _of_piece(queries: Tensor, keys: Tensor, values: Tensor, piece: _Piece) -> tuple[Tensor, Tensor]:
    """The keys and values that a piece's queries look at, in their dtype."""
    begin, end, dtype = piece.begin, piece.end, queries.dtype
    return keys[:, begin:end].to(dtype), values[:, begin:end].to(dtype)


def _attend_part(queries: Tensor, keys: Tensor, values: Tensor, piece: _Piece, scores: Scores) -> tuple[Tensor, Tensor]:
    """As :func:`_attend` in float32, with the logarithm of the sum of exponentials: [tokens, heads, 1]."""
    tokens, heads, head_dim = queries.shape
    kv_heads = keys.shape[0]
    keys, values = _of_piece(queries, keys, values, piece)
    if scores.softcap is not None:
        return _attend_exactly(queries, keys, values, piece.mask, scores)
    keys, values = keys.unsqueeze(0), values.unsqueeze(0)
    # The only CPU kernel of torch that returns the logarithm.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    if piece.mask is None:
        group = heads // kv_heads
        folded = queries.view(tokens, kv_heads, group, head_dim).transpose(0, 1).reshape(1, kv_heads, -1, head_dim)
        out, weight = kernel(folded, keys, values, scale=scores.scale)
        out = out.view(kv_heads, tokens, group, head_dim).transpose(0, 1).reshape(tokens, heads, head_dim)
        weight = weight.view(kv_heads, tokens, group).transpose(0, 1).reshape(tokens, heads, 1)
    else:
        turned = queries.transpose(0, 1).unsqueeze(0)
        out, weight = kernel(turned, keys, values, attn_mask=piece.mask, scale=scores.scale)
        out, weight = out.squeeze(0).transpose(0, 1), weight.squeeze(0).transpose(0, 1).unsqueeze(-1)
    return out.float(), weight


def _attend_exactly(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scores: Scores
) -> tuple[Tensor, Tensor]:
    """As :func:`_attend_part`, with float32 scores. A float mask is added; a bool mask is True where a query sees."""
    tokens, heads, head_dim = queries.shape
    kv_heads, group = keys.shape[0], heads // keys.shape[0]
    folded = queries.view(tokens, kv_heads, group, head_dim).permute(1, 2, 0, 3).float()
    products = folded @ keys.float().transpose(1, 2).unsqueeze(1)  # [kv_heads, group, tokens, positions]
    products *= head_dim**-0.5 if scores.scale is None else scores.scale
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    if mask is not None:
        products = products.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else products + mask
    weight = products.logsumexp(-1, keepdim=True)
    out = (products - weight).exp() @ values.float().unsqueeze(1)
    return (
        out.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim),
        weight.permute(2, 0, 1, 3).reshape(tokens, heads, 1),
    )


def _without_sinks(out: Tensor, weight: Tensor, sinks: Tensor | None) -> Tensor:
    """``out`` [tokens, heads, head_dim] less the sinks' share; ``weight`` [tokens, heads, 1] is that of the rest."""
    return out if sinks is None else out * torch.sigmoid(weight - sinks[:, None])
