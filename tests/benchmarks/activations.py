"""What rounding activations to bytes costs, and what second bytes give back.

    python -m tests.benchmarks.activations MODEL.gguf TEXT

A model whose weights are blocks runs in float32, on torch. Its linear layers round their activations as the CPU kernels
do, with several rules for who gets a second byte. Prints how far the next tokens' distributions are from those without
any rounding.
"""

import argparse
from pathlib import Path
from unittest import mock

from torch import Tensor
from torch.nn import functional

from rbee_worker.config import EngineConfig
from rbee_worker.kernels import formats
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.model.decoder import Batch
from rbee_worker.runtime.model.linear.linear import DenseLinear

RULES = {
    "one byte": float("inf"),
    "a second byte where a scale is three times the mean": 3.0,
    "a second byte where a scale is twice the mean": 2.0,
    "a second byte where a scale is 1.5 times the mean": 1.5,
    "a second byte everywhere": 0.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=600)
    options = parser.parse_args()
    engine = Engine(EngineConfig(device="cpu", dtype="float32", max_context=options.tokens))
    for _ in engine.load(options.model):
        pass
    assert engine.model is not None
    tokens = engine.model.tokenizer.encode(options.text.read_text("utf-8"))[: options.tokens]
    exact = logits(engine, tokens)
    print("| activations | mean KL divergence | largest | same likeliest token | with a second byte |")
    print("|---|---|---|---|---|")
    for name, rule in RULES.items():
        shares: list[float] = []

        def rounded(layer: DenseLinear, x: Tensor, shares: list[float] = shares) -> Tensor:
            held = formats.quantize_activations(x)
            once, _ = formats._to_bytes(x.reshape(len(x), -1, 32))
            shares.append(float((held.view(once.shape) != once).any(-1).float().mean()))
            return functional.linear(held.float(), layer.weight, layer.bias)

        with mock.patch.object(formats, "_FAR_ABOVE", rule), mock.patch.object(DenseLinear, "__call__", rounded):
            found = logits(engine, tokens)
        apart = functional.kl_div(found.log_softmax(-1), exact.log_softmax(-1), reduction="none", log_target=True).sum(
            -1
        )
        same = (found.argmax(-1) == exact.argmax(-1)).float().mean()
        share = sum(shares) / len(shares)
        print(f"| {name} | {apart.mean():.5f} | {apart.max():.4f} | {same:.1%} | {share:.0%} |", flush=True)


def logits(engine: Engine, tokens: list[int]) -> Tensor:
    assert engine.model is not None
    transformer = engine.model.transformer
    cache = transformer.new_cache()
    cache.reserve(len(tokens))
    found = transformer.forward(Batch.of([(cache, tokens, len(tokens))], transformer.device)).double()
    cache.release()
    return found


if __name__ == "__main__":
    main()
