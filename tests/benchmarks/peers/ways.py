"""The ways in which a model is run: each by one engine, from one form of the weights, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rbee_worker.cli.bench.decode import BATCH_PROMPT, BATCHES, CONTEXTS, PREFILLS
from tests.benchmarks.peers.models import ONNX, Model

HERE = Path(__file__).parent
Engine = Literal["rbee-worker", "llama.cpp", "transformers", "mistral.rs", "onnxruntime-genai"]

MODULES: Mapping[Engine, str] = {
    "llama.cpp": "llama_cpp",
    "transformers": "transformers",
    "mistral.rs": "mistralrs",
    "onnxruntime-genai": "onnxruntime_genai",
}
"""Engine -> the module that an interpreter must have."""
PACKAGES: Mapping[Engine, str] = {
    "llama.cpp": "llama-cpp-python==0.3.36",
    "transformers": "transformers torch",
    "mistral.rs": "mistralrs",
    "onnxruntime-genai": "onnxruntime-genai onnx onnx-ir transformers torch",
}
SCRIPTS: Mapping[Engine, str] = {
    "rbee-worker": "rbee_peer.py",
    "llama.cpp": "llama_cpp_peer.py",
    "transformers": "transformers_peer.py",
    "mistral.rs": "mistralrs_peer.py",
    "onnxruntime-genai": "onnx_peer.py",
}


@dataclass(frozen=True, slots=True)
class Way:
    """One way.

    Attributes:
        engine: that runs the model.
        form: of the weights: a GGUF form, or a dtype or quantization of the folder.
        against: the way of llama.cpp that it is compared with, by its form; empty: none.
        stored: the form on disk: ``folder``, or one of the model's twins.
        options: for the engine: ``dtype`` and ``quantize``.
    """

    engine: Engine
    form: str
    against: str = ""
    stored: str = "folder"
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.engine} {self.form}"

    def path(self, model: Model) -> Path | None:
        """What the engine is given; None: it is not there."""
        return model.folder if self.stored == "folder" else model.twins.get(self.stored)


def _of_rbee(form: str, against: str, **options: str) -> Way:
    return Way("rbee-worker", form, against, options={"dtype": "auto", "quantize": "none"} | options)


GGUF_FORMS = ("F16", "Q8_0", "Q4_0", "Q4_K_M")
WAYS = (
    _of_rbee("float16", "F16", dtype="float16"),
    _of_rbee("bfloat16", "F16", dtype="bfloat16"),
    _of_rbee("int8", "Q8_0", quantize="int8"),
    *(Way("rbee-worker", f"{form}.gguf", form, form, {"dtype": "auto", "quantize": "none"}) for form in GGUF_FORMS),
    *(Way("llama.cpp", form, stored=form) for form in GGUF_FORMS),
    Way("transformers", "bfloat16", "F16", options={"dtype": "bfloat16"}),
    Way("transformers", "float32", "F16", options={"dtype": "float32"}),
    Way("mistral.rs", "folder", "F16"),
    Way("mistral.rs", "Q8_0", "Q8_0", "Q8_0"),
    Way("onnxruntime-genai", "int4", "Q4_0", ONNX),
)


def find_pythons(candidates: Sequence[str]) -> dict[Engine, str]:
    """Engine -> the first interpreter that can import its module."""
    found: dict[Engine, str] = {"rbee-worker": sys.executable}
    for engine, module in MODULES.items():
        check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        for python in candidates:
            done = subprocess.run([python, "-c", check], check=False, capture_output=True, cwd="/")
            if done.returncode == 0:
                found[engine] = python
                break
    return found


def speed(way: Way, model: Model, python: str, tokens: int) -> dict[str, float]:
    """One round of figures, with the keys of ``rbee-worker bench decode``.

    Raises:
        RuntimeError: the engine failed; the message is its own.
    """
    path = way.path(model)
    if way.engine == "rbee-worker":
        options = [word for name, value in way.options.items() for word in (f"--{name}", value)]
        command = [python, "-m", "rbee_worker", "bench", "decode", "-m", str(path), "--runs", "1", "--json"]
        told = _last_line([*command, "--tokens", str(tokens), *options])
        figures = {key: float(figure["median"]) for key, figure in told["figures"].items()}
        return figures | {"weights_bytes": float(told["model"]["weights_bytes"])}
    wanted = {
        "model": str(path),
        "tokens": tokens,
        "prefills": PREFILLS,
        "contexts": CONTEXTS,
        "batches": BATCHES,
        "batch_prompt": BATCH_PROMPT,
        "longest": model.longest,
        **way.options,
    }
    found: dict[str, float] = _last_line([python, str(HERE / SCRIPTS[way.engine]), json.dumps(wanted)])
    return found


def perplexity(way: Way, model: Model, python: str, ids: Sequence[int]) -> dict[str, float] | None:
    """``perplexity`` and ``weights_bytes``; None: this engine does not tell it.

    Raises:
        RuntimeError: the engine failed.
    """
    if way.engine == "mistral.rs":
        return None
    wanted = {"model": str(way.path(model)), "ids": list(ids), **way.options}
    found: dict[str, float] = _last_line([python, str(HERE / SCRIPTS[way.engine]), json.dumps(wanted)])
    return found


def missing(pythons: Mapping[Engine, str], pip: Path) -> Iterable[str]:
    """What is left out, and how to have it."""
    for engine in MODULES:
        if engine not in pythons:
            yield f"{engine} is left out: {pip} install {PACKAGES[engine]}"


def _last_line(command: Sequence[str]) -> Any:
    # A peer sees nothing of this project on its way to modules: it may be another Python.
    env = dict(os.environ)
    if command[0] != sys.executable:
        env.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])
