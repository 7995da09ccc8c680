"""What int8 weights cost and give, against float16 and bfloat16.

    python tests/benchmarks/quantization.py [MODEL]

First one linear layer (5632 x 2048, six matrices in turn, so that the cache does not hold them) in each form: the rate
at which its weights are read at one row, arithmetic at more rows, error against float64. Then the model, by default
the embedded one: error of its logits, divergence, agreement and perplexity over a paragraph against float32, with the
activations of this CPU and with the coarser ones of CPUs without VNNI; memory, seconds to load, tokens a second.
The fastest of what is repeated counts: the
others were disturbed. Run it on an idle machine.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch.nn import functional

from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.events import End, LoadReport, Ready
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.model.decoder import Batch
from rbee_worker.runtime.model.linear import int8, linear
from rbee_worker.runtime.model.linear.cpu import cpu_features
from rbee_worker.runtime.model.linear.linear import LinearFormat, choose_format, make_linear

PARAGRAPH = (
    "The old lighthouse on the northern cape had not been lit for eleven years when Marta bought it from the harbour "
    "board. She had seen it first from the deck of a ferry, a white column against a grey sky, and had thought no more "
    "about it until the notice appeared in the newspaper. The price was small, because the road had been washed away "
    "in two places and nobody wanted to carry stone, glass and oil over the rocks by hand. In the first summer she "
    "repaired the stairs. In the second she learned how the lamp had worked: a wick, a pump, and a ring of prisms that "
    "bent the light into a single beam. The prisms weighed almost two tonnes and floated in a bath of mercury, so that "
    "a child could turn them with one finger. She drained the mercury, sent it away in sealed bottles, and set the "
    "ring on steel bearings instead. When the light came on again, a fishing boat far out at sea answered with its "
    "horn, three times, and she understood that somebody had been waiting for it."
)
ROWS = (1, 4, 8, 32, 128, 512)
OUT, IN, COPIES = 5632, 2048, 6
CPU = torch.device("cpu")


def forms() -> dict[str, LinearFormat]:
    return {
        "float16": choose_format(CPU, "float16"),
        "bfloat16": choose_format(CPU, "bfloat16"),
        "int8": choose_format(CPU, "float16", "int8"),
    }


@torch.inference_mode()
def seconds_per_call(call: Callable[[int], object], budget: float) -> float:
    call(0)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < COPIES or time.perf_counter() - began < budget:
        start = time.perf_counter()
        call(len(times) % COPIES)
        times.append(time.perf_counter() - start)
    return min(times)


def measure_layer(budget: float) -> Iterator[str]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator) * 0.02
    batches = {rows: torch.randn(rows, IN, generator=generator) for rows in ROWS}
    yield "| form | " + " | ".join(["1 row, GB/s"] + [f"{rows}, Gop/s" for rows in ROWS[1:]]) + " | error |"
    for name, form in forms().items():
        layers = [make_linear(weight, None, form) for _ in range(COPIES)]
        cells = []
        for rows, x in batches.items():
            inputs = x.to(form.activation_dtype)
            seconds = seconds_per_call(lambda i, x=inputs, layers=layers: layers[i](x), budget)
            moved, done = layers[0].nbytes / seconds, 2 * rows * OUT * IN / seconds
            cells.append(f"{moved / 1e9:.1f}" if rows == 1 else f"{done / 1e9:.0f}")
        exact = batches[32].double() @ weight.double().T
        ours = layers[0](batches[32].to(form.activation_dtype)).double()
        yield f"| {name} | {' | '.join(cells)} | {float((ours - exact).norm() / exact.norm()):.1e} |"


def load(model: str | None, dtype: str, quantize: str) -> tuple[Engine, LoadReport]:
    engine = Engine(EngineConfig(device="cpu", dtype=dtype, quantize=quantize, max_context=2048))
    last = list(engine.load(model))[-1]
    assert isinstance(last, Ready)
    return engine, last.report


def logits_of(engine: Engine) -> tuple[torch.Tensor, list[int]]:
    assert engine.model is not None
    transformer, tokens = engine.model.transformer, engine.model.tokenizer.encode(PARAGRAPH)
    cache = transformer.new_cache()
    cache.reserve(len(tokens))
    logits = transformer.forward(Batch.of([(cache, tokens, len(tokens))], transformer.device))
    cache.release()
    return logits, tokens


def rates(engine: Engine, runs: int) -> tuple[float, float]:
    """Prefill of the paragraph and decode behind it, tokens a second."""
    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    ends = [list(engine.generate(GenerationRequest(prompt=PARAGRAPH, sampling=sampling)))[-1] for _ in range(runs + 1)]
    told = [end for end in ends[1:] if isinstance(end, End)]
    return (
        max(1000 * end.prompt_tokens / end.prefill_time_ms for end in told),
        max(end.tokens_per_second for end in told),
    )


def measure_model(model: str | None, runs: int) -> Iterator[str]:
    exact, tokens = logits_of(load(model, "float32", "none")[0])
    targets = torch.tensor(tokens[1:])
    likeliest, spread = exact.argmax(1), exact.double().log_softmax(1)
    lowest = float(functional.cross_entropy(exact[:-1], targets).exp())
    yield f"{len(tokens)} tokens; perplexity in float32 {lowest:.2f}"
    yield "| weights | logit error | divergence | same top token | perplexity | memory | load | prefill | decode |"
    ways: list[tuple[str, str, str, int | None]] = [
        ("float16", "float16", "none", None),
        ("bfloat16", "bfloat16", "none", None),
        ("int8", "float16", "int8", cpu_features().int8_levels),
    ]
    if cpu_features().int8_levels == int8.LEVELS:
        ways.append(("int8, as without VNNI", "float16", "int8", 63))
    for name, dtype, quantize, levels in ways:
        features = replace(cpu_features(), int8_levels=levels)
        with mock.patch.object(linear, "cpu_features", lambda features=features: features):
            engine, report = load(model, dtype, quantize)
        ours, _ = logits_of(engine)
        error = float((ours.double() - exact.double()).norm() / exact.double().norm())
        divergence = functional.kl_div(ours.double().log_softmax(1), spread, log_target=True, reduction="batchmean")
        perplexity = functional.cross_entropy(ours[:-1], targets).exp()
        agreement = (ours.argmax(1) == likeliest).double().mean()
        prefill, decode = rates(engine, runs)
        yield (
            f"| {name} | {error:.1e} | {float(divergence):.1e} | {float(agreement):.1%} | {float(perplexity):.2f} "
            f"| {sum(report.device_mb.values())} MiB | {report.phases['loading_to_vram']:.1f} s "
            f"| {prefill:.0f} tok/s | {decode:.1f} tok/s |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="what MODEL means on the command line")
    parser.add_argument("--runs", type=int, default=3, help="generations of each form")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure of the layer")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, form in forms().items():
        print(f"{name} runs as {form.kernel}", f", activations of {form.levels} levels a side" * (name == "int8"))
    for line in measure_layer(arguments.seconds):
        print(line, flush=True)
    print()
    for line in measure_model(arguments.model, arguments.runs):
        print(line, flush=True)


if __name__ == "__main__":
    main()
