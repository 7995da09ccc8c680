"""The operators around the linear layers: the kernels against torch's as the model uses them.

One thread, in turn, CPU time, the best of several rounds. Attention of one token goes over the caches of many layers,
as a step of the model does.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.operators
"""

import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from rbee_worker.kernels.arguments import RotaryTables, Segments
from rbee_worker.kernels.library import Kernels, Variant, built, supported
from rbee_worker.runtime.model import layers, rope
from rbee_worker.runtime.model.attention import RunAttention, Segment

MODELS = {"135M": (576, 9, 3, 64, 1536), "1.1B": (2048, 32, 4, 64, 5632)}
"""Hidden size, heads, kv_heads, head_dim, width of the MLP: SmolLM2-135M and TinyLlama-1.1B."""

CONTEXTS = (128, 512, 2048, 5169)
COLD_BYTES = 48 << 20
ROUNDS = 15
VARIANTS: tuple[Variant, ...] = ("avx2", "avx512")

Call = Callable[[], object]


def timed(calls: dict[str, Call], repeats: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds of each call, which does its work ``repeats`` times."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            best[name] = min(best[name], (time.thread_time() - begin) * 1e6 / repeats)
    return best


def show(what: str, best: dict[str, float]) -> None:
    print(what.ljust(34), "  ".join(f"{name} {micros:.1f}" for name, micros in best.items()), flush=True)


def in_runs(context: int, count: int) -> list[tuple[int, int]]:
    size = -(-context // count // 16) * 16
    begins = range(0, context, size)
    return [(begin + 16 * i, min(begin + size, context) + 16 * i) for i, begin in enumerate(begins)]


def attention(own: dict[str, Kernels], model: str, tokens: int, context: int, count: int) -> None:
    _, heads, kv_heads, head_dim, _ = MODELS[model]
    runs = in_runs(context, count)
    before, positions = context - tokens, runs[-1][1] + 16
    queries = torch.randn(tokens, heads + 2 * kv_heads, head_dim)[:, :heads]
    segments = Segments([(0, tokens, before, runs)])
    many = max(1, COLD_BYTES // (2 * kv_heads * positions * head_dim * 4)) if tokens == 1 else 1
    many = min(many, 60)
    cache = SimpleNamespace(length=before, runs=lambda _count: runs)
    by_torch = RunAttention([Segment(cache, 0, tokens)], torch.float32)  # type: ignore[arg-type]
    calls: dict[str, Call] = {}
    for dtype, short in ((torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")):
        pool = torch.randn(many, 2, kv_heads, positions, head_dim).to(dtype)
        if dtype == torch.float32:
            calls["torch f32"] = lambda pool=pool: [by_torch(queries, *layer) for layer in pool]
        for name, kernels in own.items():
            calls[f"{name} {short}"] = lambda kernels=kernels, pool=pool: [
                kernels.attention(queries, layer[0], layer[1], segments, scale=head_dim**-0.5) for layer in pool
            ]
    best = timed(calls, many, ROUNDS if tokens == 1 else 3)
    show(f"{model} {tokens} of {context}, {len(runs)} runs", best)


def others(own: dict[str, Kernels], model: str, tokens: int) -> None:
    hidden, heads, kv_heads, head_dim, width = MODELS[model]
    both, repeats = heads + kv_heads, 1000 if tokens == 1 else 3
    x, weight, total = torch.randn(tokens, hidden), torch.randn(hidden), torch.zeros(tokens, hidden)
    gate_up, qkv = torch.randn(tokens, 2 * width), torch.randn(tokens, both + kv_heads, head_dim)
    rows, slots = torch.arange(tokens), torch.arange(tokens)
    cos, sin = torch.randn(tokens, head_dim).cos(), torch.randn(tokens, head_dim).sin()
    keys, values = torch.zeros(2, kv_heads, tokens, head_dim)
    norm, tables = layers.RMSNorm(weight, 1e-6), RotaryTables(cos, sin, rows)

    def rotated() -> None:
        turned = rope.rotate_halves(qkv[:, :both], (cos.unsqueeze(1), sin.unsqueeze(1)))
        keys.index_copy_(1, slots, turned[:, heads:].transpose(0, 1))
        values.index_copy_(1, slots, qkv[:, both:].transpose(0, 1))

    operators: dict[str, tuple[Call, Callable[[Kernels], object]]] = {
        "norm": (lambda: norm(x), lambda k: k.rms_norm(x, weight, 1e-6)),
        "add, norm": (
            lambda: norm(torch.add(total, x)),
            lambda k: k.rms_norm(x, weight, 1e-6, residual=total, multiplier=1.0),
        ),
        "rotate, store": (rotated, lambda k: k.rotate_and_store(qkv, keys, values, slots, tables=tables)),
    }
    for activation in ("silu", "gelu", "gelu-tanh"):
        by_torch = layers.gated(activation)
        operators[activation] = (
            lambda by_torch=by_torch: by_torch(gate_up),
            lambda k, activation=activation: k.gated(gate_up, activation),
        )
    for operator, (by_torch, by_kernels) in operators.items():
        calls: dict[str, Call] = {"torch": lambda by_torch=by_torch: [by_torch() for _ in range(repeats)]}
        for name, kernels in own.items():
            calls[name] = lambda kernels=kernels, by_kernels=by_kernels: [by_kernels(kernels) for _ in range(repeats)]
        show(f"{model} {operator}, {tokens} tokens", timed(calls, repeats, 7))


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    own = {variant: Kernels(variant, 1) for variant in VARIANTS if built(variant) and supported(variant)}
    print("microseconds")
    for model in MODELS:
        for tokens in (1, 512):
            others(own, model, tokens)
        for context in CONTEXTS:
            for count in (1, 4):
                attention(own, model, 1, context, count)
        for context in CONTEXTS:
            attention(own, model, min(512, context), context, 1)


if __name__ == "__main__":
    main()
