"""With the worker's own kernels a sequence has the same bits alone and beside any others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from rbee_worker.kernels.library import attends, cpu_kernels, missing_reason
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.model.decoder import Transformer
from rbee_worker.runtime.model.linear import linear
from rbee_worker.runtime.model.linear.cpu import cpu_features
from tests.engines import loaded

from .families import CASES, Case
from .test_families import FAMILIES, save, submit
from .test_logits import logits_of, transformer_of
from .test_stored import EXPERTS, stored

pytestmark = [
    pytest.mark.cpu_forms,
    pytest.mark.skipif(cpu_kernels() is None, reason=f"the kernels do not run here: {missing_reason()}"),
]


@pytest.fixture(autouse=True)
def bfloat16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some CPUs that multiply bfloat16 themselves leave it to oneDNN; the kernels run there too."""
    monkeypatch.setattr(linear, "cpu_features", lambda: replace(cpu_features(), bf16_arithmetic=False))


LENGTHS = (5, 33, 1, 17, 48, 2, 16, 9, 31)
WIDE = Case("Llama", {"hidden_size": 288, "intermediate_size": 480, "num_attention_heads": 6, "head_dim": 48})


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in LENGTHS]


def native(engine: Engine) -> Transformer:
    transformer = transformer_of(engine)
    assert transformer.form.native
    if not attends(transformer.config.head_dim, transformer.cache.dtype):
        pytest.skip(f"torch attends to heads of {transformer.config.head_dim}")
    return transformer


HOW: dict[str, tuple[int, int, bool]] = {
    **{f"of {count}": (count, 1000, False) for count in range(2, len(LENGTHS) + 1)},
    "the other way round": (len(LENGTHS), 1000, True),
    **{f"in pieces of {chunk}": (len(LENGTHS), chunk, False) for chunk in (1, 7, 16)},
    **{f"of one, in pieces of {chunk}": (1, chunk, True) for chunk in (1, 7)},
}
"""How many sequences are computed together, in pieces of how many tokens, and whether the last comes first."""


def check(transformer: Transformer) -> None:
    given = prompts()
    alone = [logits_of(transformer, [prompt])[0] for prompt in given]
    wrong = {}
    for how, (count, chunk, turned) in HOW.items():
        step = -1 if turned else 1
        found = logits_of(transformer, given[::step][:count], chunk)
        different = [int((mine != wanted).any(1).sum()) for mine, wanted in zip(found, alone[::step], strict=False)]
        if any(different):
            wrong[how] = different
    assert not wrong, f"how they are computed, and tokens of each sequence that differ: {wrong}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_logits_are_the_same_beside_any_others(name: str, dtype: str, tmp_path: Path) -> None:
    case = CASES[name]
    check(native(loaded(save(case, tmp_path / "model"), dtype, max_context=case.context)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_so_are_a_wider_model_s(dtype: str, tmp_path: Path) -> None:
    check(native(loaded(save(WIDE, tmp_path / "model"), dtype)))


@pytest.mark.parametrize("case", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_so_are_those_of_blocks(kind: Type, case: Case | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if case is None else {"case": case}
    check(native(loaded(stored(tmp_path / "model.gguf", kind, **options), "auto")))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_likeliest_tokens_are_the_same_beside_any_others(dtype: str, first_layers: Path) -> None:
    """Sequences that come and go, whose prompts are cut, and whose blocks lie wherever there is room."""
    engine = loaded(first_layers, dtype, prefill_chunk=16, max_context=256)
    native(engine)
    alone = [tokens(engine, [prompt])[0] for prompt in prompts()]
    for count in (2, 3, 5, 9):
        assert tokens(engine, prompts()[:count]) == alone[:count]


def tokens(engine: Engine, wanted: list[list[int]]) -> list[list[int]]:
    sequences = [submit(engine, prompt, 12 + 5 * number) for number, prompt in enumerate(wanted)]
    while not all(sequence.finished for sequence in sequences):
        engine.step()
    return [sequence.tokens[len(prompt) : len(prompt) + 12] for sequence, prompt in zip(sequences, wanted, strict=True)]
