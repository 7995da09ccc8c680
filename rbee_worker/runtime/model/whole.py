"""Whether a decoder layer is one call of the worker's own CPU kernels: where they have all of its operators."""

from collections.abc import Sequence

from torch import Tensor

from rbee_worker.kernels.arguments import RotaryTables
from rbee_worker.kernels.layer import AttentionParts, KernelLayer, NormParts
from rbee_worker.kernels.library import attends
from rbee_worker.runtime.architecture.config import Activation
from rbee_worker.runtime.model.layers import HeadNorm, KernelRMSNorm, Norm
from rbee_worker.runtime.model.linear.linear import Linear
from rbee_worker.runtime.model.linear.stored import StoredLinear
from rbee_worker.runtime.model.step import Heads


def whole_layer(
    linears: Sequence[Linear],
    norms: Sequence[Norm | None],
    *,
    heads: Heads,
    activation: Activation,
    multiplier: float,
    cached: tuple[Tensor, Tensor],
    tables: Sequence[RotaryTables],
) -> KernelLayer | None:
    """A layer as one call; None: the kernels lack an operator of it, so that it runs operator by operator.

    Args:
        linears: of queries, keys and values; of attention's output; of gate and up; down.
        norms: before attention, after it, before the MLP, after it.
        heads: of attention.
        activation: of the gate.
        multiplier: of what is added to the residual stream.
        cached: the layer's keys and values.
        tables: of the model's rotations.
    """
    parts = [linear.part for linear in linears if isinstance(linear, StoredLinear)]
    own = [norm if isinstance(norm, KernelRMSNorm) else None for norm in norms]
    before, after, between, last = own
    normed = heads.norm
    if before is None or between is None or len(parts) < len(linears) or not attends(heads.size, cached[0].dtype):
        return None
    if own != list(norms) or not (normed is None or (isinstance(normed, HeadNorm) and normed.root_mean_square)):
        return None
    qkv, o, gate_up, down = parts
    scores = heads.scores
    return KernelLayer(
        qkv,
        o,
        gate_up,
        down,
        norms=NormParts(
            before.weight,
            between.weight,
            None if after is None else after.weight,
            None if last is None else last.weight,
            before.eps,
        ),
        attention=AttentionParts(
            heads.queries,
            heads.size,
            *cached,
            heads.table(tables),
            None if normed is None else normed.weight,
            0.0 if normed is None else normed.eps,
            heads.scale,
            scores.window,
            scores.softcap,
            scores.sinks,
        ),
        activation=activation,
        multiplier=multiplier,
    )
