"""How near logits come to exact arithmetic on the weights of a GGUF file: this worker's kernels beside llama.cpp.

    python -m tests.benchmarks.exactness --python ENV/bin/python             # logits, file by file
    python -m tests.benchmarks.exactness --python ENV/bin/python perplexity  # of the default model, at each width

ENV is an environment that has llama-cpp-python. Exact are the weights that the file decodes to, in float32, by torch.
Files: the default model's own, and those that llama.cpp's quantizer makes of a small random model whose widths are
multiples of 256. Some of its channels are far above the others, as those of trained models are. The cache is
float32 on both sides, so that they round nothing but activations.

The text is from the queries of Newton's Opticks, fourth edition, London 1730 (opticks.txt).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from rbee_worker.kernels.library import Variant, built, supported
from rbee_worker.runtime.source import resolve
from tests.benchmarks.peers.models import DEFAULT, prepare, quantize, write_gguf
from tests.tiny import byte_tokenizer

TEXT = Path(__file__).with_name("opticks.txt")
PEERS = Path(__file__).parent / "peers"
FORMS = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
"""Name of a GGUF form -> its number in llama.cpp (``llama_ftype``)."""
ALL_VARIANTS: tuple[Variant, ...] = ("avx2", "avx512")
VARIANTS = tuple(variant for variant in ALL_VARIANTS if supported(variant) and built(variant))
LLAMA_CPP: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "a token a pass": {"batch": 1},
    "one thread": {"threads": 1},
    "weights not repacked": {"repack": False},
}
"""The ways in which llama.cpp computes the same."""
WINDOW = 1024
CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}

Logits = npt.NDArray[np.float32]


def write_random(folder: Path) -> Path:
    """A Llama of random weights in Hugging Face layout, with a tokenizer of bytes and one merge."""
    random = np.random.default_rng(0)
    hidden, inner, heads = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_attention_heads"]
    cached = int(hidden) // int(heads) * int(CONFIG["num_key_value_heads"])
    shapes = {"model.embed_tokens": (CONFIG["vocab_size"], hidden), "lm_head": (CONFIG["vocab_size"], hidden)}
    norms = ["model.norm"]
    for layer in range(int(CONFIG["num_hidden_layers"])):
        names = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes |= {f"{names[0]}.{role}_proj": (rows, hidden) for role, rows in (("q", hidden), ("k", cached))}
        shapes |= {f"{names[0]}.{role}_proj": (rows, hidden) for role, rows in (("v", cached), ("o", hidden))}
        shapes |= {f"{names[1]}.{role}_proj": (inner, hidden) for role in ("gate", "up")}
        shapes[f"{names[1]}.down_proj"] = (hidden, inner)
        norms += [f"model.layers.{layer}.{role}_layernorm" for role in ("input", "post_attention")]
    tensors = {name: random.normal(0, 0.05, shape).astype(np.float16) for name, shape in shapes.items()}
    for name in norms:
        far = np.where(random.random(int(hidden)) < 1 / 64, 6.0, 1.0)
        tensors[name] = (far * random.normal(1, 0.3, int(hidden))).astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.weight": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    tokenizer = json.loads(byte_tokenizer().to_str())
    tokenizer["model"]["vocab"]["ab"] = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["merges"] = ["a b"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return folder


def write_forms(folder: Path, work: Path, python: str) -> dict[str, Path]:
    """GGUF files of a folder in each form, by llama.cpp's quantizer."""
    made = {"F16": work / "F16.gguf"}
    write_gguf(folder, made["F16"])
    for form, number in FORMS.items():
        if form not in made:
            made[form] = work / f"{form}.gguf"
            quantize(python, made["F16"], made[form], number)
    return made


def ask(command: Sequence[str], wanted: Mapping[str, Any], **environment: str) -> dict[str, Any]:
    """What a peer says; its logits, if a file is wanted for them, under ``logits``.

    Raises:
        RuntimeError: it failed; the message is its own.
    """
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or command[0] == sys.executable}
    full = [*command, json.dumps(wanted)]
    done = subprocess.run(full, capture_output=True, text=True, check=False, env=kept | environment)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError((done.stderr.strip() or "it said nothing").splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "logits" in wanted:
        found["logits"] = np.load(wanted["logits"])
    return found


def ours(kernels: str, model: Path, dtype: str = "auto", quantize: str = "none", **wanted: Any) -> dict[str, Any]:
    """What this worker says, with ``RBEE_KERNELS`` set to ``kernels``."""
    command = [sys.executable, str(PEERS / "rbee_peer.py")]
    return ask(command, {"model": str(model), "dtype": dtype, "quantize": quantize, **wanted}, RBEE_KERNELS=kernels)


def theirs(python: str, model: Path, **wanted: Any) -> dict[str, Any]:
    """What llama.cpp says."""
    return ask([python, str(PEERS / "llama_cpp_peer.py")], {"model": str(model), **wanted})


@dataclass(frozen=True)
class Comparison:
    """Logits of the same tokens.

    Attributes:
        exact: of the decoded weights, in float32.
        ours: by variant; ``theirs``: by way of ``LLAMA_CPP``.
    """

    exact: Logits
    ours: Mapping[str, Logits]
    theirs: Mapping[str, Logits]

    @property
    def our_errors(self) -> dict[str, float]:
        """Against the exact ones, by variant."""
        return {name: relative_error(logits, self.exact) for name, logits in self.ours.items()}

    @property
    def their_errors(self) -> dict[str, float]:
        """Against the exact ones, by way."""
        return {name: relative_error(logits, self.exact) for name, logits in self.theirs.items()}

    @property
    def their_spread(self) -> float:
        """The largest difference between two of llama.cpp's ways."""
        ways = list(self.theirs.values())
        return max(relative_error(one, other) for one in ways for other in ways)

    @property
    def apart(self) -> float:
        """The largest difference between one of our variants and one of llama.cpp's ways."""
        return max(relative_error(mine, one) for mine in self.ours.values() for one in self.theirs.values())


def relative_error(logits: Logits, exact: Logits) -> float:
    """The norm of the difference, by the norm of the exact ones; of what is added to all logits of a token nothing."""
    one, other = (values.astype(float) - values.mean(1, keepdims=True, dtype=float) for values in (logits, exact))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def compare(model: Path, ids: Sequence[int], python: str, work: Path) -> Comparison:
    """Have a file's logits computed in every way."""
    wanted = {"windows": [list(ids)], "logits": str(work / "logits.npy")}
    return Comparison(
        ours("torch", model, "float32", **wanted)["logits"],
        {variant: ours(variant, model, **wanted)["logits"] for variant in VARIANTS},
        {name: theirs(python, model, **wanted, **way)["logits"] for name, way in LLAMA_CPP.items()},
    )


def default_model() -> Path:
    """The default model's own GGUF file."""
    return resolve(None).path


def tokens_of_text(folder: Path) -> list[int]:
    """The text by the default model's tokenizer."""
    text = TEXT.read_text("utf-8")
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def logits(python: str, work: Path, count: int) -> Iterator[str]:
    """The table of logits."""
    random = np.random.default_rng(1)
    files = {f"random, {form}": path for form, path in write_forms(write_random(work / "random"), work, python).items()}
    model = prepare(DEFAULT, work, python)
    tables = [(name, path, random.integers(0, 256, count).tolist()) for name, path in files.items()]
    tables.append(("default model, Q4_1", default_model(), tokens_of_text(model.folder)[:count]))
    names = [f"{variant}, error" for variant in VARIANTS]
    yield f"| file | {' | '.join(names)} | llama.cpp, error | its ways among themselves | ours to its |"
    yield f"|---|{'---|' * (len(names) + 3)}"
    for name, path, ids in tables:
        found = compare(path, ids, python, work)
        least, most = min(found.their_errors.values()), max(found.their_errors.values())
        cells = [f"{error:.1e}" for error in found.our_errors.values()]
        cells += [f"{least:.1e} to {most:.1e}", f"{found.their_spread:.1e}", f"{found.apart:.1e}"]
        yield f"| {name} | {' | '.join(cells)} |"


def perplexity(python: str, work: Path) -> Iterator[str]:
    """The table of perplexity."""
    model = prepare(DEFAULT, work, python)
    ids, own = tokens_of_text(model.folder), default_model()
    windows = [ids[begin : begin + WINDOW] for begin in range(0, len(ids) - 1, WINDOW)]
    files = {"F16": model.twins["F16"], "Q4_1": own} | {form: model.twins[form] for form in ("Q8_0", "Q4_0")}
    exact = np.array(ours("torch", own, "float32", windows=windows)["nll"])
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "rbee-worker, float16": lambda: ours("torch", own, "float16", windows=windows),
        "rbee-worker, bfloat16": lambda: ours("torch", own, "bfloat16", windows=windows),
        "rbee-worker, int8": lambda: ours("torch", own, quantize="int8", windows=windows),
    }
    for form, path in files.items():
        for variant in VARIANTS:
            ways[f"rbee-worker, {form} as stored, {variant}"] = partial(ours, variant, path, windows=windows)
        ways[f"llama.cpp, {form}"] = partial(theirs, python, path, windows=windows)
    yield f"Perplexity over {exact.size} tokens; the weights of the file in float32: {np.exp(exact.mean()):.3f}.\n"
    yield "| engine and weights | perplexity | to float32 |\n|---|---|---|"
    for name, measured in ways.items():
        nll = np.array(measured()["nll"])
        apart = nll - exact
        error = apart.std() / np.sqrt(apart.size)
        yield f"| {name} | {np.exp(nll.mean()):.3f} | {100 * apart.mean():+.2f} % ± {100 * error:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=("logits", "perplexity"), default="logits")
    parser.add_argument("--python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=128, help="of the logits")
    parser.add_argument("--work", type=Path, help="where models go; without it: a folder that is removed again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        lines = (
            perplexity(options.python, work)
            if options.table == "perplexity"
            else logits(options.python, work, options.tokens)
        )
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
