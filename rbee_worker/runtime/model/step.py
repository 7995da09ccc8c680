"""What the layers of one forward pass share: how queries, keys and values of all its tokens become attention.

:class:`TorchStep` calls torch's operators, on any device. :class:`KernelStep` calls the worker's own CPU kernels, and
torch for what they do not have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from rbee_worker.kernels.arguments import RotaryTables, Segments
from rbee_worker.kernels.layer import KernelLayer, StepTokens
from rbee_worker.kernels.library import Kernels, attends
from rbee_worker.runtime.architecture.config import LayerTraits, ModelConfig
from rbee_worker.runtime.cache.kv_cache import KVCache
from rbee_worker.runtime.model.attention import RunAttention, Scores, Segment, attention_for
from rbee_worker.runtime.model.layers import HeadNorm, Norm, query_key_norm
from rbee_worker.runtime.model.rope import Tables, rotate

_Table = TypeVar("_Table", Tables, RotaryTables)


@dataclass(frozen=True, slots=True)
class Heads:
    """A layer's heads, and what happens to them.

    Attributes:
        layer: the layer's number.
        queries: how many heads of queries; ``keys``: of keys, and of values; ``size``: numbers in each.
        norm: of queries and keys, side by side, before they are rotated; None: there is none.
        traits: of the layer, which say whether and by which table it rotates.
        interleaved: whether neighbours are rotated, or else halves.
        scores: what is special about its attention scores.
    """

    layer: int
    queries: int
    keys: int
    size: int
    norm: Norm | None
    traits: LayerTraits
    interleaved: bool
    scores: Scores

    @classmethod
    def of(cls, config: ModelConfig, index: int, vectors: Mapping[str, Tensor]) -> "Heads":
        """Those of a layer. ``vectors``: norm weights and sinks by role."""
        traits = config.layers[index]
        sinks = vectors["sinks"].float() if config.attention_sinks else None
        return cls(
            index,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            query_key_norm(config, vectors),
            traits,
            config.rope_interleaved,
            Scores(traits.window, config.attention_scale, config.attention_softcap, sinks),
        )

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.size**-0.5 if self.scores.scale is None else self.scores.scale

    def table(self, tables: Sequence[_Table]) -> _Table | None:
        """The layer's own of the model's rotations; None: it has none."""
        return None if self.traits.rope == "none" else tables[self.traits.rope == "local"]

    def split(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values of [tokens, all of them side by side] as [tokens, heads, size]."""
        return qkv.view(-1, self.queries + 2 * self.keys, self.size)


class Step(Protocol):
    """One forward pass's part in attention."""

    def attend(self, qkv: Tensor, heads: Heads) -> Tensor:
        """Norm, rotate and store the new tokens' keys and values, and attend.

        Args:
            qkv: [tokens, (queries + 2 keys) * size], which may be changed.
            heads: of the layer.

        Returns:
            [tokens, queries * size].
        """


class TorchStep:
    """The operators are torch's."""

    def __init__(
        self,
        cache: KVCache,
        slots: Tensor,
        segments: Sequence[Segment],
        tables: Sequence[Tables],
        dtype: torch.dtype,
    ) -> None:
        """Prepare a pass.

        Args:
            cache: takes the keys and values.
            slots: where in its pool the tokens' go, int64 [tokens].
            segments: whose tokens they are.
            tables: of the rotations for these tokens.
            dtype: of the activations.
        """
        self._cache, self._slots, self._tables = cache, slots, tables
        self._attention = attention_for(segments, dtype, slots.device)

    def attend(self, qkv: Tensor, heads: Heads) -> Tensor:
        """See :class:`Step`."""
        qkv, both = heads.split(qkv), heads.queries + heads.keys
        rotated = qkv[:, :both]
        if heads.norm is not None:
            rotated = heads.norm(rotated)
        if (table := heads.table(self._tables)) is not None:
            rotated = rotate(rotated, table, interleaved=heads.interleaved)
        keys, values = self._cache.write(heads.layer, self._slots, rotated[:, heads.queries :], qkv[:, both:])
        return self._attention(rotated[:, : heads.queries], keys, values, heads.scores)


class KernelStep:
    """The operators are the worker's own; activations are float32.

    A layer whose operators they all are is one call (:meth:`layer`).
    """

    def __init__(
        self,
        kernels: Kernels,
        cache: KVCache,
        slots: Tensor,
        segments: Sequence[Segment],
        tables: Sequence[RotaryTables],
    ) -> None:
        """As :class:`TorchStep`; ``tables``: of the model's rotations, at least one."""
        self._kernels, self._cache, self._slots, self._tables = kernels, cache, slots, tables
        self._segments = Segments(
            (segment.start, segment.count, segment.cache.length, segment.cache.runs(segment.count))
            for segment in segments
        )
        self._fallback = RunAttention(segments, torch.float32)
        self._tokens = StepTokens(self._segments, tables[0].rows, slots)
        self._between = torch.empty(0)

    def layer(self, layer: KernelLayer, hidden: Tensor, addend: Tensor | None) -> Tensor:
        """Add the addend to hidden states [tokens, hidden_size], and then all of a layer but its last addend.

        Returns:
            The last addend, which may lie where the first did.
        """
        after = torch.empty_like(hidden) if addend is None else addend
        if self._between.numel() < self._tokens.count * layer.floats:
            self._between = hidden.new_empty(self._tokens.count * layer.floats)
        self._kernels.layer(layer, self._tokens, hidden, after, self._between, pending=addend is not None)
        return after

    def attend(self, qkv: Tensor, heads: Heads) -> Tensor:
        """See :class:`Step`."""
        qkv, scores = heads.split(qkv), heads.scores
        keys, values = self._cache.layer(heads.layer)
        weights, eps = self._normed(qkv, heads)
        tables = heads.table(self._tables)
        queries = self._kernels.rotate_and_store(qkv, keys, values, self._slots, tables=tables, norm=weights, eps=eps)
        if not attends(heads.size, keys.dtype):
            return self._fallback(queries, keys, values, scores)
        return self._kernels.attention(
            queries,
            keys,
            values,
            self._segments,
            scale=heads.scale,
            window=scores.window,
            softcap=scores.softcap,
            sinks=scores.sinks,
        )

    @staticmethod
    def _normed(qkv: Tensor, heads: Heads) -> tuple[Tensor | None, float]:
        """The norm that is left to the rotation: its weights and its epsilon. Others are applied in place."""
        norm = heads.norm
        if isinstance(norm, HeadNorm) and norm.root_mean_square:
            return norm.weight, norm.eps
        if norm is not None:
            both = qkv[:, : heads.queries + heads.keys]
            both.copy_(norm(both))
        return None, 0.0
