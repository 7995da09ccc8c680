"""Several sequences at once: the engine's own time per step, and a long prompt among chats.

    python tests/benchmarks/batching.py overhead
    python tests/benchmarks/batching.py starvation models/SmolLM2-135M-Instruct

``overhead``: a random tiny model, for which the time around the forward pass is most of the time.
``starvation``: the time between two tokens of twenty chats, without and with one long prompt coming in.
Prints median, minimum and maximum. Run it on an idle machine.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.runtime.engine.engine import Engine

PROMPT = "Question {0}: tell a story about the number {0} and what it did on its holidays by the sea last year."


def load(model: str, **config: Any) -> Engine:
    engine = Engine(EngineConfig(**config))
    for _ in engine.load(model):
        pass
    return engine


def request(text: str, tokens: int, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True} | sampling)
    return GenerationRequest(prompt=text, sampling=params)


def summary(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def overhead(options: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.tiny import write_tiny_model

    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "temperature, top-p": {"temperature": 0.8, "top_p": 0.9},
        "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.2},
        "logprobs": {"logprobs": 5},
    }
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_model(Path(folder) / "tiny", max_position_embeddings=4096))
        engine = load(model, device="cpu", dtype="float32", max_batch_size=max(options.sizes))
    assert engine.model is not None
    transformer = engine.model.transformer
    inner, spent = transformer.forward, [0.0]

    def timed(batch: Any) -> Any:
        began = time.perf_counter()
        out = inner(batch)
        spent[0] += time.perf_counter() - began
        return out

    transformer.forward = timed  # type: ignore[method-assign]
    print("| sampling | sequences | around the forward pass, us a step | us a sequence |\n|---|---|---|---|")
    for name, sampling in kinds.items():
        for size in options.sizes:
            sequences = [engine.submit(request("x" * 40, options.tokens, **sampling)) for _ in range(size)]
            while any(sequence.pending != 1 for sequence in sequences):
                engine.step()
            steps: list[float] = []
            while not any(sequence.finished for sequence in sequences):
                spent[0], began = 0.0, time.perf_counter()
                engine.step()
                steps.append((time.perf_counter() - began - spent[0]) * 1e6)
            while engine.has_work:
                engine.step()
            middle = statistics.median(steps)
            print(f"| {name} | {size} | {middle:.0f} | {middle / size:.0f} |")


def starvation(options: argparse.Namespace) -> None:
    chats = 20
    engine = load(options.model, dtype=options.dtype, max_batch_size=chats + 1, prefix_cache=False)
    assert engine.model is not None
    length = min(8000, engine.model.context_length - 100)
    gaps: dict[str, list[float]] = {"chats alone": [], f"beside a prompt of {length}": []}
    for name, measured in gaps.items():
        for number in range(chats):
            engine.submit(request(PROMPT.format(number), 10_000))
        while any(s.pending != 1 for s in engine._sequences.values()):
            engine.step()
        long = None
        if measured is not gaps["chats alone"]:
            long = engine.submit(request(" hello" * length, 1))
        for _ in range(options.tokens):
            if long is not None and long.finished:
                break
            began = time.perf_counter()
            engine.step()
            measured.append((time.perf_counter() - began) * 1e3)
        for job_id in list(engine._sequences):
            engine.cancel(job_id)
        engine.step()
        print(f"{name}: {summary(measured)} ms between two tokens")
    alone, beside = (statistics.median(measured) for measured in gaps.values())
    print(f"ratio {beside / alone:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    for measure in (overhead, starvation):
        kind = kinds.add_parser(measure.__name__)
        kind.set_defaults(run=measure)
        if measure is starvation:
            kind.add_argument("model", help="a folder in Hugging Face layout")
            kind.add_argument("--dtype", default="auto")
        kind.add_argument("--tokens", type=int, default=64)
        kind.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
