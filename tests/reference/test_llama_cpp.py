"""GGUF files that run as they are stored, beside llama.cpp on the same files and tokens.

It needs an interpreter with llama-cpp-python, in an environment of its own:

    LLAMA_CPP_PYTHON=ENV/bin/python pytest tests/reference/test_llama_cpp.py
"""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import exactness

from .test_families import fill
from .test_gguf_families import CASES, write

PYTHON = os.environ.get("LLAMA_CPP_PYTHON", "")
TOKENS = 96

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LLAMA_CPP_PYTHON names no interpreter that has llama-cpp-python"),
    pytest.mark.skipif(not exactness.VARIANTS, reason="no variant of the kernels runs here"),
]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    work = tmp_path_factory.mktemp("forms")
    return exactness.write_forms(exactness.write_random(work / "random"), work, PYTHON)


@pytest.mark.parametrize("form", exactness.FORMS)
def test_logits_are_nearer_to_the_weights_than_llama_cpp_s(
    forms: Mapping[str, Path], form: str, tmp_path: Path
) -> None:
    ids = np.random.default_rng(1).integers(0, 256, TOKENS).tolist()
    check(exactness.compare(forms[form], ids, PYTHON, tmp_path))


def test_so_are_the_default_model_s(gguf_path: Path, model_dir: Path, tmp_path: Path) -> None:
    ids = exactness.tokens_of_text(model_dir)[:TOKENS]
    check(exactness.compare(gguf_path, ids, PYTHON, tmp_path))


def test_a_mixture_of_experts_is_the_one_that_llama_cpp_has(tmp_path: Path) -> None:
    case = replace(CASES["qwen3moe"], changes=CASES["qwen3moe"].changes | {"vocab_size": 257})  # as many as tokens
    path = write(tmp_path / "model.gguf", "qwen3moe", fill(case).eval())
    wanted = {"windows": [list(range(TOKENS))], "logits": str(tmp_path / "logits.npy")}
    mine = exactness.ours("torch", path, "float32", **wanted)["logits"]
    assert exactness.relative_error(mine, exactness.theirs(PYTHON, path, **wanted)["logits"]) < 1e-5


def check(found: exactness.Comparison) -> None:
    mine, their = max(found.our_errors.values()), max(found.their_errors.values())
    assert mine < min(found.their_errors.values())
    assert their < 0.5  # they are logits of the same model
    # What either rounds is the other's rounding no more than by chance.
    assert found.apart < found.their_spread + 1.2 * math.hypot(mine, their)
