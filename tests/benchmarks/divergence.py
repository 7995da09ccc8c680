"""What quantizing costs: the divergence of a model's next tokens from those of its 16-bit weights, beside llama.cpp.

    RBEE_KERNELS=auto python -m tests.benchmarks.divergence FOLDER TEXT --llama-python PYTHON

FOLDER is a plain Llama whose weights were never quantized, ``train.py`` makes one. Measured is the last twentieth of
TEXT, in pieces of 128 tokens: the mean and the largest Kullback-Leibler divergence from the weights in float32, how
often the likeliest token is the same, and the bits that a weight takes in memory. PYTHON is an interpreter that has
llama-cpp-python; its quantizer makes the GGUF files, and it runs them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from gguf import GGUFReader

from rbee_worker.config import EngineConfig
from rbee_worker.runtime.architecture.roles import parameters
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.model.decoder import Batch
from rbee_worker.runtime.model.linear import linear
from rbee_worker.runtime.model.linear.cpu import cpu_features
from tests.benchmarks.peers.models import TWINS, prepare

PIECE, PIECES = 128, 24

_LLAMA = """
import json, sys
import llama_cpp, numpy
path, pieces, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
llama = llama_cpp.Llama(path, n_ctx=len(pieces[0]), logits_all=True, verbose=False)
found = []
for piece in pieces:
    llama.reset()
    llama.eval(piece)
    found.append(numpy.array(llama.scores[: len(piece)], numpy.float32))
numpy.save(out, numpy.concatenate(found))
"""


@torch.inference_mode()
def ours(path: Path, pieces: Sequence[list[int]], dtype: str, quantize: str) -> tuple[torch.Tensor, int, str]:
    """Logits [tokens, vocab_size] of the worker, the bytes of its weights, and what they run as."""
    engine = Engine(EngineConfig(device="cpu", dtype=dtype, quantize=quantize, max_context=PIECE))
    report = list(engine.load(str(path)))[-1].report
    transformer = engine.model.transformer
    logits = []
    for piece in pieces:
        cache = transformer.new_cache()
        cache.reserve(len(piece))
        logits.append(transformer.forward(Batch.of([(cache, piece, len(piece))], transformer.device)))
        cache.release()
    return torch.cat(logits), transformer.nbytes, report.runs_as


def llamas(python: str, path: Path, pieces: Sequence[list[int]]) -> tuple[torch.Tensor, int]:
    """The same of llama.cpp, by way of a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        subprocess.run([python, "-c", _LLAMA, str(path), json.dumps(pieces), file.name], check=True)
        return torch.from_numpy(np.load(file.name)), sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)


def measure(folder: Path, text: str, python: str | None) -> Iterator[str]:
    model = prepare(str(folder), folder.parent, python)
    engine = Engine(EngineConfig(device="cpu", dtype="float32", max_context=PIECE))
    list(engine.load(str(folder)))
    ids = engine.model.tokenizer.encode(text[len(text) * 19 // 20 :])
    pieces = [ids[begin : begin + PIECE] for begin in range(0, PIECE * PIECES, PIECE)]
    count = parameters(engine.model.config)
    exact = ours(folder, pieces, "float32", "none")[0].double().log_softmax(-1)
    following = torch.tensor(ids[1 : len(exact) + 1])
    loss = float(-exact.gather(1, following[:, None]).mean())
    yield f"{count / 1e6:.1f} M weights, {len(exact)} tokens, loss {loss:.2f} nats\n"
    yield "| engine, weights | bits a weight | mean divergence | largest | same likeliest token |"
    yield "|---|---|---|---|---|"

    def row(name: str, logits: torch.Tensor, nbytes: int) -> str:
        found = logits.double().log_softmax(-1)
        each = (exact.exp() * (exact - found)).sum(-1)
        same = float((exact.argmax(-1) == found.argmax(-1)).double().mean())
        return (
            f"| {name} | {8 * nbytes / count:.2f} | {float(each.mean()):.2e} | {float(each.max()):.1e} | {same:.1%} |"
        )

    for dtype, quantize in (("float16", "none"), ("auto", "int8"), ("auto", "int4")):
        logits, nbytes, runs_as = ours(folder, pieces, dtype, quantize)
        yield row(f"rbee-worker, {quantize if quantize != 'none' else dtype}: {runs_as}", logits, nbytes)
    without = replace(cpu_features(), kernels=None)
    with mock.patch.object(linear, "cpu_features", return_value=without):
        logits, nbytes, _ = ours(folder, pieces, "auto", "int8")
        yield row("rbee-worker, int8 without the kernels", logits, nbytes)
    for form in TWINS:
        if form in model.twins and python is not None:
            yield row(f"llama.cpp, {form}", *llamas(python, model.twins[form], pieces))
            logits, nbytes, _ = ours(model.twins[form], pieces, "auto", "none")
            yield row(f"rbee-worker, the same {form} file", logits, nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a Llama in Hugging Face layout")
    parser.add_argument("text", type=Path, help="what it was trained on")
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python")
    options = parser.parse_args()
    for line in measure(options.folder, options.text.read_text("utf-8"), options.llama_python):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
