"""rbee-worker and transformers on the same model, side by side.

    python tests/benchmarks/side_by_side.py models/SmolLM2-135M-Instruct

Each figure is taken in a process of its own, the engines in turn (A B C, A B C, …), so that a machine whose speed
drifts does not favour one. Prints median, minimum and maximum: seconds from the start of loading until the model is
ready, prefill of ``--prompt-tokens`` and decode behind them in tokens a second. Run it on an idle machine.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ENGINES = {
    "rbee-worker auto": ("rbee", "auto"),
    "rbee-worker float16": ("rbee", "float16"),
    "rbee-worker bfloat16": ("rbee", "bfloat16"),
    "rbee-worker float32": ("rbee", "float32"),
    "transformers bfloat16": ("transformers", "bfloat16"),
    "transformers float32": ("transformers", "float32"),
}
FIGURES = ("load s", "prefill tok/s", "decode tok/s")
WARM_UP_TOKENS = 8


def measure_rbee(model: str, dtype: str, prompt_tokens: int, tokens: int) -> Iterator[float]:
    from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
    from rbee_worker.runtime.engine.engine import Engine

    began = time.perf_counter()
    engine = Engine(EngineConfig(dtype=dtype, prefill_chunk=prompt_tokens, prefix_cache=False))
    for _ in engine.load(model):
        pass
    yield time.perf_counter() - began

    def run(count: int) -> tuple[float, float]:
        """Seconds of the prompt and of the tokens after the first."""
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        sequence = engine.submit(GenerationRequest(prompt=" hello" * prompt_tokens, sampling=sampling))
        assert sequence.prompt_tokens == prompt_tokens
        start = time.perf_counter()
        engine.step()
        first = time.perf_counter()
        while not sequence.finished:
            engine.step()
        return first - start, time.perf_counter() - first

    run(WARM_UP_TOKENS)
    prefill, decode = run(tokens)
    yield prompt_tokens / prefill
    yield (tokens - 1) / decode


def measure_transformers(model: str, dtype: str, prompt_tokens: int, tokens: int) -> Iterator[float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    yield time.perf_counter() - began
    prompt = torch.tensor([tokenizer(" hello" * prompt_tokens)["input_ids"]])
    assert prompt.shape[1] == prompt_tokens

    @torch.inference_mode()
    def run(count: int) -> tuple[float, float]:
        start = time.perf_counter()
        out = loaded(prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = time.perf_counter()
        for _ in range(count - 1):
            out = loaded(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            token.item()
        return first - start, time.perf_counter() - first

    run(WARM_UP_TOKENS)
    prefill, decode = run(tokens)
    yield prompt_tokens / prefill
    yield (tokens - 1) / decode


MEASURES: dict[str, Callable[[str, str, int, int], Iterator[float]]] = {
    "rbee": measure_rbee,
    "transformers": measure_transformers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder in Hugging Face layout")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, dtype = options.one
        figures = MEASURES[kind](options.model, dtype, options.prompt_tokens, options.tokens)
        print(json.dumps(list(figures)))
        return
    results: dict[str, list[list[float]]] = {name: [] for name in options.engines}
    for _ in range(options.runs):
        for name, rows in results.items():
            rows.append(measure_in_process(options, ENGINES[name]))
    print(f"{platform.processor() or platform.machine()}, {platform.platform()}; {Path(options.model).name}; ", end="")
    print(f"{options.runs} runs, prompt {options.prompt_tokens}, {options.tokens} tokens: median (min-max)\n")
    print(f"| engine | {' | '.join(FIGURES)} |\n|---|{'---|' * len(FIGURES)}")
    for name, rows in results.items():
        cells = [f"{statistics.median(c):.3g} ({min(c):.3g}-{max(c):.3g})" for c in zip(*rows, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


def measure_in_process(options: argparse.Namespace, engine: tuple[str, str]) -> list[float]:
    lengths = ["--prompt-tokens", str(options.prompt_tokens), "--tokens", str(options.tokens)]
    command = [sys.executable, __file__, options.model, *lengths, "--one", *engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return [float(figure) for figure in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    main()
