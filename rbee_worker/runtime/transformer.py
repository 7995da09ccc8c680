"""The decoder, read from top to bottom: embed, layers of attention and MLP, norm, head.

Tokens of all sequences of a step lie side by side in one [tokens, hidden] tensor. Norms and linear layers see them
all at once; attention goes sequence by sequence, each over its own cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.runtime.attention import attend
from rbee_worker.runtime.kv_cache import SequenceCache
from rbee_worker.runtime.layers import RMSNorm, Rotary
from rbee_worker.runtime.linear import Linear, LinearFormat, make_linear
from rbee_worker.runtime.model_config import ModelConfig

Weights = Mapping[str, Tensor]
"""Tensors of one group by role, such as ``q.weight``."""


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

    def __init__(self, config: ModelConfig, weights: Weights, form: LinearFormat) -> None:
        self._config = config
        self.attention_norm = _norm(config, weights["attention_norm.weight"], form)
        self.qkv = _fused(weights, ("q", "k", "v"), form)
        self.o = _fused(weights, ("o",), form)
        self.mlp_norm = _norm(config, weights["mlp_norm.weight"], form)
        self.gate_up = _fused(weights, ("gate", "up"), form)
        self.down = _fused(weights, ("down",), form)
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
    """Token embedding [vocab_size, hidden_size], and the head made from it when the two are tied."""

    __slots__ = ("head", "nbytes", "table")

    def __init__(self, config: ModelConfig, weights: Weights, form: LinearFormat) -> None:
        self.table = weights["embedding"].to(form.weight_dtype)
        self.head = make_linear(self.table, None, form) if config.tie_word_embeddings else None
        # A dense head is the table itself; a packed one is a second copy in another layout.
        copied = self.head is not None and form.kernel != "dense"
        self.nbytes = self.table.nbytes + (self.head.nbytes if self.head is not None and copied else 0)

    def __call__(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.table)


class Output:
    """Final norm, and the head [vocab_size, hidden_size] when it is not the embedding's."""

    __slots__ = ("head", "nbytes", "norm")

    def __init__(self, config: ModelConfig, weights: Weights, form: LinearFormat) -> None:
        self.norm = _norm(config, weights["norm"], form)
        self.head = None if config.tie_word_embeddings else make_linear(weights["head"], None, form)
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
        """Take the next part: the embedding, the layers in order, the output."""
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


def _norm(config: ModelConfig, weight: Tensor, form: LinearFormat) -> RMSNorm:
    return RMSNorm(weight.to(form.activation_dtype), config.rms_norm_eps)


def _fused(weights: Weights, roles: tuple[str, ...], form: LinearFormat) -> Linear:
    """One linear layer from the matrices of several, stacked along their outputs."""
    matrices = [weights[f"{role}.weight"] for role in roles]
    biases = [weights[f"{role}.bias"] for role in roles if f"{role}.bias" in weights]
    weight = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    bias = None if not biases else torch.cat(biases)
    return make_linear(weight, bias, form)
