"""The decoder, read from top to bottom: embed, layers of attention and MLP, norm, head.

What differs between families is chosen from :class:`ModelConfig` when a layer is made. A Llama runs no code of other
families.

The tokens of all sequences of a step lie side by side in one tensor [tokens, hidden]. Norms and linear layers take them
all at once. In attention each token sees its own sequence's part of the cache.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.config import DTypeName
from rbee_worker.kernels.arguments import RotaryTables
from rbee_worker.kernels.layer import KernelLayer
from rbee_worker.kernels.library import Kernels
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.cache.kv_cache import ROTATION, KVCache, Rotation, SequenceCache
from rbee_worker.runtime.model.attention import Segment
from rbee_worker.runtime.model.layers import Norm, gated, norm_or_none
from rbee_worker.runtime.model.linear.linear import Linear, LinearFormat, kernels_of
from rbee_worker.runtime.model.linear.stored import StoredTable
from rbee_worker.runtime.model.moe import Experts
from rbee_worker.runtime.model.rope import rotaries
from rbee_worker.runtime.model.step import Heads, KernelStep, Step, TorchStep
from rbee_worker.runtime.model.whole import whole_layer

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


class Residual:
    """The residual stream [tokens, hidden_size], to which the layers add.

    What is added waits for the norm that follows, so that one operator can do both.
    """

    __slots__ = ("_addend", "_hidden", "_multiplier")

    def __init__(self, hidden: Tensor, multiplier: float) -> None:
        """``hidden``: the embedded tokens, which may be changed; ``multiplier``: of all that is added."""
        self._hidden, self._multiplier = hidden, multiplier
        self._addend: Tensor | None = None

    def add(self, addend: Tensor) -> None:
        """Add the output of attention or of an MLP."""
        self._settle()
        self._addend = addend

    def normed(self, norm: Norm | None) -> Tensor:
        """What has been added up so far, and normed if there is a norm."""
        if norm is None:
            return self._settle()
        if self._addend is None:
            return norm(self._hidden)
        self._hidden, normed = norm.of_sum(self._hidden, self._addend, self._multiplier)
        self._addend = None
        return normed

    def through(self, step: KernelStep, layer: KernelLayer) -> None:
        """Run a whole layer, which adds to the stream."""
        self._addend = step.layer(layer, self._hidden, self._addend)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the tokens."""
        if len(rows) < self._hidden.shape[0]:
            self._hidden = self._hidden[rows]
            self._addend = None if self._addend is None else self._addend[rows]

    def _settle(self) -> Tensor:
        if self._addend is not None:
            self._hidden = torch.add(self._hidden, self._addend, alpha=self._multiplier)
            self._addend = None
        return self._hidden


class SelfAttention:
    """Queries, keys and values by one matrix; norm, rotation, attention; then the output matrix."""

    __slots__ = ("heads", "nbytes", "o", "qkv")

    def __init__(
        self, config: ModelConfig, index: int, vectors: Mapping[str, Tensor], linears: Mapping[str, Linear]
    ) -> None:
        self.qkv, self.o = linears["qkv"], linears["o"]
        self.heads = Heads.of(config, index, vectors)
        self.nbytes = self.qkv.nbytes + self.o.nbytes

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.o(step.attend(self.qkv(x), self.heads))


class MLP:
    """A gated MLP; gate and up are one matrix."""

    __slots__ = ("_gated", "activation", "down", "gate_up", "nbytes")

    def __init__(self, config: ModelConfig, linears: Mapping[str, Linear], kernels: Kernels | None = None) -> None:
        self.gate_up, self.down = linears["gate_up"], linears["down"]
        self.activation = config.activation
        self._gated = gated(config.activation, kernels)
        self.nbytes = self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self._gated(self.gate_up(x)))


class DecoderLayer:
    """Attention, then an MLP. Each adds to its input. There are norms before them, after them, or both."""

    __slots__ = (
        "_multiplier",
        "_whole",
        "attention",
        "attention_norm",
        "attention_post_norm",
        "mlp",
        "mlp_norm",
        "mlp_post_norm",
        "nbytes",
    )

    def __init__(
        self,
        config: ModelConfig,
        vectors: Mapping[str, Tensor],
        attention: SelfAttention,
        mlp: MLP | Experts,
        kernels: Kernels | None = None,
    ) -> None:
        """``vectors``: norm weights and biases by role; ``kernels``: norm by them."""
        self.attention, self.mlp = attention, mlp
        self.attention_norm = norm_or_none(config, vectors, "attention_norm", kernels)
        self.attention_post_norm = norm_or_none(config, vectors, "attention_post_norm", kernels)
        self.mlp_norm = norm_or_none(config, vectors, "mlp_norm", kernels)
        self.mlp_post_norm = norm_or_none(config, vectors, "mlp_post_norm", kernels)
        self.nbytes = attention.nbytes + mlp.nbytes + sum(vector.nbytes for vector in vectors.values())
        self._multiplier = config.residual_multiplier
        self._whole: KernelLayer | None = None

    def place(self, cache: KVCache, tables: Sequence[RotaryTables]) -> None:
        """Say where keys and values are from now on. If the CPU kernels have all its operators, it becomes one call.

        ``tables``: of the model's rotations, for the kernels.
        """
        attention, mlp = self.attention, self.mlp
        if isinstance(mlp, MLP):
            self._whole = whole_layer(
                (attention.qkv, attention.o, mlp.gate_up, mlp.down),
                (self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm),
                heads=attention.heads,
                activation=mlp.activation,
                multiplier=self._multiplier,
                cached=cache.layer(attention.heads.layer),
                tables=tables,
            )

    def __call__(self, residual: Residual, step: Step) -> None:
        if self._whole is not None and isinstance(step, KernelStep):
            residual.through(step, self._whole)
            return
        attended = self.attention(residual.normed(self.attention_norm), step)
        residual.add(attended if self.attention_post_norm is None else self.attention_post_norm(attended))
        mapped = self.mlp(residual.normed(self.mlp_norm))
        residual.add(mapped if self.mlp_post_norm is None else self.mlp_post_norm(mapped))


class ParallelLayer(DecoderLayer):
    """Attention and MLP side by side, after one norm."""

    __slots__ = ()

    def __call__(self, residual: Residual, step: Step) -> None:
        normed = residual.normed(self.attention_norm)
        residual.add(self.attention(normed, step))
        residual.add(self.mlp(normed))


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

    def __init__(
        self,
        config: ModelConfig,
        vectors: Mapping[str, Tensor],
        head: Linear | None,
        kernels: Kernels | None = None,
    ) -> None:
        self.norm = norm_or_none(config, vectors, "norm", kernels)
        self.head = head
        self.nbytes = sum(vector.nbytes for vector in vectors.values()) + (head.nbytes if head is not None else 0)


Part = Embedding | DecoderLayer | Output
"""What one group of weights becomes."""


class Transformer:
    """A decoder-only language model, which ``loading/load.py`` puts together part by part."""

    def __init__(self, config: ModelConfig, form: LinearFormat, device: torch.device, context_length: int) -> None:
        self.config = config
        self.form = form
        self.kernels = kernels_of(form)
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

    def allocate_cache(self, positions: int, dtype: DTypeName = "auto", *, prefix_cache: bool = True) -> None:
        """Take the memory of the KV cache, for ``positions`` tokens of all sequences together."""
        held = self.form.cache_dtype(dtype)
        self.cache = KVCache(self.config, positions, held, self.device, prefix_cache=prefix_cache)
        if self.kernels is not None:
            tables = [rotary.whole(torch.empty(0, dtype=torch.int64)) for rotary in self.rotaries]
            for layer in self.layers:
                layer.place(self.cache, tables)

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

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Around a step: beside the CPU kernels torch computes with one thread.

        Its idle threads look for work for some milliseconds after each operator, and would take the cores from the
        kernels' threads.
        """
        before = torch.get_num_threads()
        if self.kernels is None or before == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Run one step and write keys and values to the caches. Room must have been reserved in them.

        Their ``length`` does not change: whoever owns the sequence calls :meth:`SequenceCache.advance`.

        Returns:
            float32 logits of the wanted tokens of all segments, side by side: [outputs of all segments, vocab_size].
        """
        step = self._step(batch)
        residual = Residual(self._embedding(batch.tokens, self.form.activation_dtype), self.config.residual_multiplier)
        for layer in self.layers:
            layer(residual, step)
        residual.keep(
            [
                row
                for segment in batch.segments
                for row in range(segment.start + segment.count - segment.outputs, segment.start + segment.count)
            ]
        )
        return self._finished(self._head(residual.normed(self._output.norm)).float())

    def _finished(self, logits: Tensor) -> Tensor:
        """Logits, float32 [tokens, vocab_size], after the multiplier and the soft cap that some families have."""
        config = self.config
        if config.logit_multiplier != 1.0:
            logits = logits * config.logit_multiplier
        if config.final_softcap is not None:
            # The last term is 0; without it tanh would make a finite logit of an infinite one.
            logits = torch.tanh(logits / config.final_softcap) * config.final_softcap + logits * 0
        return logits

    def _step(self, batch: Batch) -> Step:
        places = [slot for segment in batch.segments for slot in segment.cache.slots(segment.count)]
        slots = torch.tensor(places, device=self.device)
        if self.kernels is not None:
            whole = [rotary.whole(batch.rows) for rotary in self.rotaries]
            return KernelStep(self.kernels, self.cache, slots, batch.segments, whole)
        dtype = self.form.activation_dtype
        tables = [rotary.at(batch.rows, dtype) for rotary in self.rotaries]
        return TorchStep(self.cache, slots, batch.segments, tables, dtype)
