"""The decoder, read from top to bottom: embed, layers of attention and MLP, norm, head.

Tokens of all sequences of a step lie side by side in one [tokens, hidden] tensor. Norms and linear layers see them
all at once; attention goes sequence by sequence, each over its own cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.runtime.attention import attend
from rbee_worker.runtime.kv_cache import SequenceCache
from rbee_worker.runtime.layers import RMSNorm, Rotary
from rbee_worker.runtime.linear import DenseLinear, Linear, LinearFormat
from rbee_worker.runtime.model_config import ModelConfig

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"gate_up": ("gate", "up"), "down": ("down",), "qkv": ("q", "k", "v"), "o": ("o",)}
)
"""Linear layers of a decoder layer, and the matrices that each holds stacked along their outputs; largest first."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A sequence's share of a batch: ``count`` tokens from row ``start``, behind what its cache holds."""

    cache: SequenceCache
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: int64 token ids and positions, each [tokens], and whose they are."""

    tokens: Tensor
    positions: Tensor
    segments: Sequence[Segment]


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

    def __call__(
        self, hidden: Tensor, index: int, segments: Sequence[Segment], tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        hidden = hidden + self.o(self._attention(self.attention_norm(hidden), index, segments, tables))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(functional.silu(gate) * up)

    def _attention(self, x: Tensor, index: int, segments: Sequence[Segment], tables: tuple[Tensor, Tensor]) -> Tensor:
        config = self._config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = self.qkv(x).view(-1, heads + 2 * kv_heads, config.head_dim)
        rotated = Rotary.rotate(qkv[:, : heads + kv_heads], tables)
        values = qkv[:, heads + kv_heads :]
        outputs = []
        for segment in segments:
            rows = slice(segment.start, segment.start + segment.count)
            cached = segment.cache.write(index, rotated[rows, heads:], values[rows])
            outputs.append(attend(rotated[rows, :heads], *cached))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


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

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence of up to ``context_length`` tokens."""
        return SequenceCache(self.config, self.context_length, self.form.activation_dtype, self.device)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Run one step and fill the caches.

        Returns:
            float32 logits of the last token of each segment, [segments, vocab_size].
        """
        last = [segment.start + segment.count - 1 for segment in batch.segments]
        hidden = self._hidden(batch)
        if len(last) < hidden.shape[0]:
            hidden = hidden[last]
        return self._logits(hidden)

    @torch.inference_mode()
    def forward_all(self, batch: Batch) -> Tensor:
        """As :meth:`forward`, with the logits of every token: [tokens, vocab_size]."""
        return self._logits(self._hidden(batch))

    def _hidden(self, batch: Batch) -> Tensor:
        for segment in batch.segments:
            segment.cache.reserve(segment.count)
        dtype = self.form.activation_dtype
        tables = self.rotary.at(batch.positions, dtype)
        hidden = self._embedding(batch.tokens).to(dtype)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, index, batch.segments, tables)
        for segment in batch.segments:
            segment.cache.advance(segment.count)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(self._output.norm(hidden)).float()
