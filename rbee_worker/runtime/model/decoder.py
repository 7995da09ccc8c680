"""The decoder, read from top to bottom: embed, layers of attention and MLP, norm, head.

What differs between families is chosen from :class:`ModelConfig` when a layer is made. A Llama runs no code of other
families.

The tokens of all sequences of a step lie side by side in one tensor [tokens, hidden]. Norms and linear layers take them
all at once. In attention each token sees its own sequence's part of the cache.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.cache.kv_cache import ROTATION, KVCache, Rotation, SequenceCache
from rbee_worker.runtime.model.attention import Attention, Scores, Segment, attention_for
from rbee_worker.runtime.model.layers import gated, norm_or_nothing, query_key_norm
from rbee_worker.runtime.model.linear.linear import Linear, LinearFormat
from rbee_worker.runtime.model.linear.stored import StoredTable
from rbee_worker.runtime.model.moe import Experts
from rbee_worker.runtime.model.rope import Tables, rotaries, rotation

MLP_LINEARS: Mapping[str, tuple[str, ...]] = MappingProxyType({"gate_up": ("gate", "up"), "down": ("down",)})
ATTENTION_LINEARS: Mapping[str, tuple[str, ...]] = MappingProxyType({"qkv": ("q", "k", "v"), "o": ("o",)})
"""Linear layers, and the stored matrices that each holds, stacked along their outputs. The largest comes first."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: int64 token ids and rows of the rotary tables, each [tokens], and whose tokens they are."""

    tokens: Tensor
    rows: Tensor
    segments: Sequence[Segment]

    @classmethod
    def of(cls, shares: Iterable[tuple[SequenceCache, Sequence[int], int]], device: torch.device) -> "Batch":
        """A batch of shares: a sequence's cache, its next tokens, and for how many of them logits are wanted."""
        tokens: list[int] = []
        rows: list[int] = []
        segments = []
        for cache, share, outputs in shares:
            segments.append(Segment(cache, len(tokens), len(share), outputs))
            tokens.extend(share)
            row = cache.rotation.start + cache.length
            rows.extend(range(row, row + len(share)))
        return cls(torch.tensor(tokens, device=device), torch.tensor(rows, device=device), segments)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """A layer's part of the cache in one step.

    Attributes:
        cache: the pool; ``index``: the layer's.
        slots: where in the pool the step's tokens go, int64 [tokens].
        attention: of the step.
    """

    cache: KVCache
    index: int
    slots: Tensor
    attention: Attention

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
        """Store the new tokens' keys and values, and attend: each [tokens, heads or kv_heads, head_dim]."""
        return self.attention(queries, *self.cache.write(self.index, self.slots, keys, values), scores)


class SelfAttention:
    """Queries, keys and values by one matrix; norm, rotation, attention; then the output matrix."""

    __slots__ = ("_head_dim", "_heads", "_kv_heads", "_norm", "_rotate", "_scores", "nbytes", "o", "qkv")

    def __init__(
        self, config: ModelConfig, index: int, vectors: Mapping[str, Tensor], linears: Mapping[str, Linear]
    ) -> None:
        layer = config.layers[index]
        self.qkv, self.o = linears["qkv"], linears["o"]
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = config.head_dim
        self._norm = query_key_norm(config, vectors)
        self._rotate = rotation(config, layer)
        sinks = vectors["sinks"].float() if config.attention_sinks else None
        self._scores = Scores(layer.window, config.attention_scale, config.attention_softcap, sinks)
        self.nbytes = self.qkv.nbytes + self.o.nbytes

    def __call__(self, x: Tensor, cache: LayerCache, tables: tuple[Tables, ...]) -> Tensor:
        heads, both = self._heads, self._heads + self._kv_heads
        qkv = self.qkv(x).view(-1, both + self._kv_heads, self._head_dim)
        rotated = self._rotate(self._norm(qkv[:, :both]), tables)
        return self.o(cache.attend(rotated[:, :heads], rotated[:, heads:], qkv[:, both:], self._scores))


class MLP:
    """A gated MLP; gate and up are one matrix."""

    __slots__ = ("_gated", "down", "gate_up", "nbytes")

    def __init__(self, config: ModelConfig, linears: Mapping[str, Linear]) -> None:
        self.gate_up, self.down = linears["gate_up"], linears["down"]
        self._gated = gated(config.activation)
        self.nbytes = self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self._gated(self.gate_up(x)))


class DecoderLayer:
    """Attention, then an MLP. Each adds to its input. There are norms before them, after them, or both."""

    __slots__ = (
        "_add",
        "attention",
        "attention_norm",
        "attention_post_norm",
        "mlp",
        "mlp_norm",
        "mlp_post_norm",
        "nbytes",
    )

    def __init__(
        self, config: ModelConfig, vectors: Mapping[str, Tensor], attention: SelfAttention, mlp: MLP | Experts
    ) -> None:
        """``vectors``: norm weights and biases by role."""
        self.attention, self.mlp = attention, mlp
        self.attention_norm = norm_or_nothing(config, vectors, "attention_norm")
        self.attention_post_norm = norm_or_nothing(config, vectors, "attention_post_norm")
        self.mlp_norm = norm_or_nothing(config, vectors, "mlp_norm")
        self.mlp_post_norm = norm_or_nothing(config, vectors, "mlp_post_norm")
        self._add = torch.add
        if config.residual_multiplier != 1.0:
            self._add = functools.partial(torch.add, alpha=config.residual_multiplier)
        self.nbytes = attention.nbytes + mlp.nbytes + sum(vector.nbytes for vector in vectors.values())

    def __call__(self, hidden: Tensor, cache: LayerCache, tables: tuple[Tables, ...]) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), cache, tables)
        hidden = self._add(hidden, self.attention_post_norm(attended))
        return self._add(hidden, self.mlp_post_norm(self.mlp(self.mlp_norm(hidden))))


class ParallelLayer(DecoderLayer):
    """Attention and MLP side by side, after one norm."""

    __slots__ = ()

    def __call__(self, hidden: Tensor, cache: LayerCache, tables: tuple[Tables, ...]) -> Tensor:
        normed = self.attention_norm(hidden)
        return hidden + self.attention(normed, cache, tables) + self.mlp(normed)


class Embedding:
    """Token embedding [vocab_size, hidden_size], and the head made from it when the two are tied (else None)."""

    __slots__ = ("_multiplier", "head", "nbytes", "table")

    def __init__(
        self, table: Tensor | StoredTable, head: Linear | None = None, multiplier: float = 1.0, *, shared: bool = False
    ) -> None:
        """``shared``: the head multiplies by the table's own memory; otherwise it is a second copy in another form."""
        self.table = table
        self._multiplier = multiplier
        self.head = head
        self.nbytes = table.nbytes + (head.nbytes if head is not None and not shared else 0)

    def __call__(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Map int64 [tokens] to [tokens, hidden_size] in the activation dtype."""
        table = self.table
        found = (functional.embedding(tokens, table) if isinstance(table, Tensor) else table(tokens)).to(dtype)
        return found if self._multiplier == 1.0 else found * self._multiplier


class Output:
    """Final norm, and the head [vocab_size, hidden_size] when it is not the embedding's (else None)."""

    __slots__ = ("head", "nbytes", "norm")

    def __init__(self, config: ModelConfig, vectors: Mapping[str, Tensor], head: Linear | None) -> None:
        self.norm = norm_or_nothing(config, vectors, "norm")
        self.head = head
        self.nbytes = sum(vector.nbytes for vector in vectors.values()) + (head.nbytes if head is not None else 0)


Part = Embedding | DecoderLayer | Output
"""What one group of weights becomes."""


class Transformer:
    """A decoder-only language model, which ``loading/load.py`` puts together part by part."""

    def __init__(self, config: ModelConfig, form: LinearFormat, device: torch.device, context_length: int) -> None:
        self.config = config
        self.form = form
        self.device = device
        self.context_length = context_length
        self.rotaries = rotaries(config, context_length, device)
        self.nbytes = 0
        self.layers: list[DecoderLayer] = []
        self.cache: KVCache
        self._embedding: Embedding
        self._output: Output
        self._head: Linear

    def place(self, part: Part) -> None:
        """Take a part. Layers come in order, the embedding and the output at any time."""
        self.nbytes += part.nbytes
        if isinstance(part, DecoderLayer):
            self.layers.append(part)
            return
        if isinstance(part, Embedding):
            self._embedding = part
        else:
            self._output = part
        if part.head is not None:
            self._head = part.head

    def allocate_cache(self, positions: int, *, prefix_cache: bool = True) -> None:
        """Take the memory of the KV cache, for ``positions`` tokens of all sequences together."""
        dtype = self.form.activation_dtype
        self.cache = KVCache(self.config, positions, dtype, self.device, prefix_cache=prefix_cache)

    def new_cache(self, tokens: int = 0) -> SequenceCache:
        """An empty table for one sequence that has so many tokens."""
        return SequenceCache(self.cache.pool, rotation=self.rotation_for(tokens))

    def rotation_for(self, tokens: int) -> Rotation:
        """The rotation for a sequence of so many tokens. LongRoPE has two (see ``rope.py``)."""
        rope = self.config.rope
        if rope.kind != "longrope" or self.context_length <= rope.original_max_positions:
            return ROTATION
        trained = rope.original_max_positions
        return Rotation(trained) if tokens > trained else Rotation(0, trained)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Run one step and write keys and values to the caches. Room must have been reserved in them.

        Their ``length`` does not change: whoever owns the sequence calls :meth:`SequenceCache.advance`.

        Returns:
            float32 logits of the wanted tokens of all segments, side by side: [outputs of all segments, vocab_size].
        """
        rows = [
            row
            for segment in batch.segments
            for row in range(segment.start + segment.count - segment.outputs, segment.start + segment.count)
        ]
        hidden = self._hidden(batch)
        if len(rows) < hidden.shape[0]:
            hidden = hidden[rows]
        return self._finished(self._head(self._output.norm(hidden)).float())

    def _finished(self, logits: Tensor) -> Tensor:
        """Logits, float32 [tokens, vocab_size], after the multiplier and the soft cap that some families have."""
        config = self.config
        if config.logit_multiplier != 1.0:
            logits = logits * config.logit_multiplier
        if config.final_softcap is not None:
            # The last term is 0; without it tanh would make a finite logit of an infinite one.
            logits = torch.tanh(logits / config.final_softcap) * config.final_softcap + logits * 0
        return logits

    def _hidden(self, batch: Batch) -> Tensor:
        dtype = self.form.activation_dtype
        slots = [slot for segment in batch.segments for slot in segment.cache.slots(segment.count)]
        slots_tensor = torch.tensor(slots, device=self.device)
        attention = attention_for(batch.segments, dtype, self.device)
        tables = tuple(rotary.at(batch.rows, dtype) for rotary in self.rotaries)
        hidden = self._embedding(batch.tokens, dtype)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, LayerCache(self.cache, index, slots_tensor, attention), tables)
        return hidden
