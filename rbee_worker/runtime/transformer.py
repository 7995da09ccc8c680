"""The decoder, read from top to bottom: embed, layers of attention and MLP, norm, head.

Tokens of all sequences of a step lie side by side in one [tokens, hidden] tensor. Norms and linear layers see them
all at once; in attention each sees its own sequence's part of the cache.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.runtime.attention import Attention, Segment, attention_for
from rbee_worker.runtime.kv_cache import KVCache, SequenceCache
from rbee_worker.runtime.layers import RMSNorm, Rotary
from rbee_worker.runtime.linear import DenseLinear, Linear, LinearFormat
from rbee_worker.runtime.model_config import ModelConfig

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"gate_up": ("gate", "up"), "down": ("down",), "qkv": ("q", "k", "v"), "o": ("o",)}
)
"""Linear layers of a decoder layer, and the matrices that each holds stacked along their outputs; largest first."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: int64 token ids and positions, each [tokens], and whose they are."""

    tokens: Tensor
    positions: Tensor
    segments: Sequence[Segment]

    @classmethod
    def of(cls, shares: Iterable[tuple[SequenceCache, Sequence[int], int]], device: torch.device) -> "Batch":
        """A batch of shares: each a sequence's cache, its next tokens, and of how many of them logits are wanted."""
        tokens: list[int] = []
        positions: list[int] = []
        segments = []
        for cache, share, outputs in shares:
            segments.append(Segment(cache, len(tokens), len(share), outputs))
            tokens.extend(share)
            positions.extend(range(cache.length, cache.length + len(share)))
        return cls(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), segments)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """A layer's part of the cache in one step.

    Attributes:
        cache: the pool; ``index``: the layer's.
        slots: where in the pool the step's tokens go, int64 [tokens].
        attention: how they look at what is there.
    """

    cache: KVCache
    index: int
    slots: Tensor
    attention: Attention

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the new tokens' keys and values, and attend: each [tokens, heads or kv_heads, head_dim]."""
        return self.attention(queries, *self.cache.write(self.index, self.slots, keys, values))


class DecoderLayer:
    """Pre-norm attention and gated MLP with residuals; q, k, v and gate, up are one matrix each."""

    __slots__ = ("_config", "attention_norm", "down", "gate_up", "mlp_norm", "nbytes", "o", "qkv")

    def __init__(self, config: ModelConfig, norms: Mapping[str, Tensor], linears: Mapping[str, Linear]) -> None:
        """Norm weights ``attention_norm`` and ``mlp_norm``, and the linear layers that :data:`FUSED` names."""
        self._config = config
        self.attention_norm = RMSNorm(norms["attention_norm"], config.rms_norm_eps)
        self.qkv = linears["qkv"]
        self.o = linears["o"]
        self.mlp_norm = RMSNorm(norms["mlp_norm"], config.rms_norm_eps)
        self.gate_up = linears["gate_up"]
        self.down = linears["down"]
        parts = (self.attention_norm, self.qkv, self.o, self.mlp_norm, self.gate_up, self.down)
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, hidden: Tensor, cache: "LayerCache", tables: tuple[Tensor, Tensor]) -> Tensor:
        hidden = hidden + self.o(self._attention(self.attention_norm(hidden), cache, tables))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(functional.silu(gate) * up)

    def _attention(self, x: Tensor, cache: "LayerCache", tables: tuple[Tensor, Tensor]) -> Tensor:
        config = self._config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = self.qkv(x).view(-1, heads + 2 * kv_heads, config.head_dim)
        rotated = Rotary.rotate(qkv[:, : heads + kv_heads], tables)
        return cache.attend(rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :])


class Embedding:
    """Token embedding [vocab_size, hidden_size], and the head made from it when the two are tied (else None)."""

    __slots__ = ("head", "nbytes", "table")

    def __init__(self, table: Tensor, head: Linear | None) -> None:
        self.table = table
        self.head = head
        # A dense head is the table itself; any other is a second copy in another form.
        copied = head is not None and not isinstance(head, DenseLinear)
        self.nbytes = table.nbytes + (head.nbytes if head is not None and copied else 0)

    def __call__(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.table)


class Output:
    """Final norm, and the head [vocab_size, hidden_size] when it is not the embedding's (else None)."""

    __slots__ = ("head", "nbytes", "norm")

    def __init__(self, config: ModelConfig, norm: Tensor, head: Linear | None) -> None:
        self.norm = RMSNorm(norm, config.rms_norm_eps)
        self.head = head
        self.nbytes = self.norm.nbytes + (self.head.nbytes if self.head is not None else 0)


Part = Embedding | DecoderLayer | Output
"""What one group of weights becomes."""


class Transformer:
    """A decoder-only language model, put together by ``loading.py`` as its parts arrive."""

    def __init__(self, config: ModelConfig, form: LinearFormat, device: torch.device, context_length: int) -> None:
        self.config = config
        self.form = form
        self.device = device
        self.context_length = context_length
        self.rotary = Rotary(config, context_length, device)
        self.nbytes = 0
        self.layers: list[DecoderLayer] = []
        self.cache: KVCache
        self._embedding: Embedding
        self._output: Output
        self._head: Linear

    def place(self, part: Part) -> None:
        """Take a part: layers come in order, the embedding and the output at any time."""
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

    def new_cache(self) -> SequenceCache:
        """An empty table for one sequence."""
        return SequenceCache(self.cache.pool)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Run one step and fill the caches, in which room must have been reserved.

        Their ``length`` does not move: what was written counts once the sequence's owner says so.

        Returns:
            float32 logits of the wanted tokens of each segment, side by side: [outputs of all segments, vocab_size].
        """
        rows = [
            row
            for segment in batch.segments
            for row in range(segment.start + segment.count - segment.outputs, segment.start + segment.count)
        ]
        hidden = self._hidden(batch)
        if len(rows) < hidden.shape[0]:
            hidden = hidden[rows]
        return self._head(self._output.norm(hidden)).float()

    def _hidden(self, batch: Batch) -> Tensor:
        dtype = self.form.activation_dtype
        slots = [slot for segment in batch.segments for slot in segment.cache.slots(segment.count)]
        slots_tensor = torch.tensor(slots, device=self.device)
        attention = attention_for(batch.segments, dtype, self.device)
        tables = self.rotary.at(batch.positions, dtype)
        hidden = self._embedding(batch.tokens).to(dtype)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, LayerCache(self.cache, index, slots_tensor, attention), tables)
        return hidden
