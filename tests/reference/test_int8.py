"""int8 weights without the worker's own kernels: what they cost in accuracy, against the same model in float32."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.config import EngineConfig
from rbee_worker.events import LoadReport, Ready
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.model.decoder import Transformer
from rbee_worker.runtime.model.linear import int8, linear
from rbee_worker.runtime.model.linear.cpu import cpu_features
from rbee_worker.runtime.model.linear.int8 import hadamard, quantize_weight, rotate
from rbee_worker.runtime.model.linear.linear import DenseLinear
from tests.engines import loaded
from tests.tiny import write_tiny_model

from .conftest import answer
from .test_logits import CONFIGS, logits_of, random_prompts, relative_error, transformer_of

PARAGRAPH = (
    "The old lighthouse on the northern cape had not been lit for eleven years when Marta bought it from the harbour "
    "board. She had seen it first from the deck of a ferry, a white column against a grey sky, and had thought no more "
    "about it until the notice appeared in the newspaper. The price was small, because the road had been washed away "
    "in two places and nobody wanted to carry stone, glass and oil over the rocks by hand. In the first summer she "
    "repaired the stairs. In the second she learned how the lamp had worked: a wick, a pump, and a ring of prisms that "
    "bent the light into a single beam."
)
CODE = "def mean(values):\n    total = 0\n    for x in values:\n        total += x\n    return total / len(values)"
TEXTS = [
    PARAGRAPH,
    CODE,
    "Water boils at a lower temperature on a mountain, because the air above it weighs less.",
]
FINEST, COARSEST = 127, 63


def dequantized(weight: Tensor) -> Tensor:
    """The float32 weights that an int8 layer of these weights stands for."""
    rotation = hadamard(weight.shape[1], weight.device)
    values, scale = quantize_weight(weight, rotation)
    return rotate(values.float() * scale[:, None], rotation)


def twin_of(engine: Engine) -> Transformer:
    """The engine's float32 model, its matrices replaced by what the int8 ones stand for."""
    twin = transformer_of(engine)
    for layer in twin.layers:
        for owner, name in (
            (layer.attention, "qkv"),
            (layer.attention, "o"),
            (layer.mlp, "gate_up"),
            (layer.mlp, "down"),
        ):
            dense = getattr(owner, name)
            assert isinstance(dense, DenseLinear)
            setattr(owner, name, DenseLinear(dequantized(dense.weight), dense.bias))
    assert isinstance(twin._head, DenseLinear)
    twin._head = DenseLinear(dequantized(twin._head.weight), None)
    return twin


def load_int8(path: Path, dtype: str = "float32") -> tuple[Engine, LoadReport]:
    engine = Engine(EngineConfig(device="cpu", dtype=dtype, quantize="int8", max_context=256))
    last = list(engine.load(str(path)))[-1]
    assert isinstance(last, Ready)
    return engine, last.report


def losses(logits: Tensor, tokens: list[int]) -> Tensor:
    """Minus the log-likelihood of each token but the first, float64."""
    return functional.cross_entropy(logits[:-1].double(), torch.tensor(tokens[1:]), reduction="none")


def set_levels(monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
    """Load int8 as on a CPU whose activations have so many levels; more than 127: in plain arithmetic."""
    monkeypatch.setattr(linear, "cpu_features", lambda: replace(cpu_features(), kernels=None, int8_levels=levels))
    if levels > FINEST:
        monkeypatch.setattr(int8, "fbgemm_product", fine_product)


@pytest.fixture(scope="module", autouse=True)
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "cpu_features", lambda: replace(cpu_features(), kernels=None))
        yield


@pytest.fixture(scope="module", params=[FINEST, COARSEST], ids=["8-bit activations", "7-bit activations"])
def levels(request: pytest.FixtureRequest) -> Iterator[int]:
    """Levels of the activations: those of CPUs with VNNI, and those of CPUs without, which any CPU can run."""
    best = cpu_features().int8_levels
    if request.param > (best or FINEST):
        pytest.skip("this CPU does not multiply 8 bits by 8 bits exactly")
    if request.param < FINEST and best is None:
        pytest.skip("this CPU has no FBGEMM, and 8 bits without it")
    with pytest.MonkeyPatch.context() as patch:
        if best is not None:
            set_levels(patch, request.param)
        yield int(request.param)


@pytest.fixture(scope="module")
def real(model_dir: Path, levels: int) -> Engine:
    """The real model in int8, with so many levels."""
    assert levels
    return load_int8(model_dir)[0]


@pytest.mark.cpu_forms
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_tiny_configs_err_by_what_eight_bits_allow(tiny_llama: Callable[..., Path], changes: dict[str, Any]) -> None:
    path = tiny_llama(**changes)
    exact = logits_of(transformer_of(loaded(path, max_context=256)), random_prompts())
    ours = logits_of(transformer_of(load_int8(path)[0]), random_prompts())
    for mine, wanted in zip(ours, exact, strict=True):
        # Random weights without a trained model's slack, and no outliers to spread: measured 0.03 to 0.07.
        assert relative_error(mine, wanted) < 0.12 * FINEST / (cpu_features().int8_levels or FINEST)


@pytest.fixture(scope="module")
def twin(first_layers: Path) -> tuple[list[list[int]], Tensor]:
    """A prompt, and the logits of the model's twin; no CPU's levels have a part in them."""
    engine = loaded(first_layers, max_context=256)
    assert engine.model is not None
    prompt = [engine.model.tokenizer.encode(CODE)]
    return prompt, logits_of(twin_of(engine), prompt)[0]


@pytest.mark.cpu_forms
def test_an_int8_model_is_its_dequantized_twin_but_for_the_activations(
    first_layers: Path, twin: tuple[list[list[int]], Tensor], levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, wanted = twin
    error = relative_error(logits_of(transformer_of(load_int8(first_layers)[0]), prompt)[0], wanted)
    assert error < 0.01 * FINEST / levels
    # Activations of 17 bits leave nothing but the weights: the product is made in plain arithmetic to take them.
    set_levels(monkeypatch, 2**17 - 1)
    fine = transformer_of(load_int8(first_layers)[0])
    assert relative_error(logits_of(fine, prompt)[0], wanted) < error / 50


def fine_product(values: Tensor, scale: Tensor, _levels: int = 0) -> Callable[[Tensor], Tensor]:
    """The integer product for activations of any number of levels."""
    return lambda rows: (rows.double() @ values.double().T * scale.double()).float()


@pytest.fixture(scope="module")
def exact(model_dir: Path) -> tuple[list[list[int]], list[Tensor]]:
    """The texts' tokens, and their logits by the model in float32."""
    engine = loaded(model_dir, max_context=256)
    assert engine.model is not None
    prompts = [engine.model.tokenizer.encode(text) for text in TEXTS]
    return prompts, logits_of(transformer_of(engine), prompts)


def test_the_real_model_keeps_its_wits(real: Engine, exact: tuple[list[list[int]], list[Tensor]], levels: int) -> None:
    """The divergence from the exact model, and the perplexity that it allows.

    The divergence of small errors grows with their square: what rounding the weights costs, and what rounding the
    activations to 127 levels costs, (127 / levels)^2 times. Measured: 0.0027 of weights, 0.0028 of activations of 127
    levels, 0.0138 in all with 63, where this gives 0.0027 + 4.06 * 0.0028 = 0.0141. A half more is allowed.
    For texts from the exact model the mean difference of the losses is the divergence, and its standard deviation over
    n tokens sqrt(2 * divergence / n): four of those are allowed on three short texts.
    """
    prompts, wanted = exact
    mine = logits_of(transformer_of(real), prompts)
    allowed = 1.5 * (0.0027 + 0.0028 * (FINEST / levels) ** 2)
    p, q = torch.cat(wanted).double().log_softmax(-1), torch.cat(mine).double().log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < allowed
    assert relative_error(torch.cat(mine), torch.cat(wanted)) < 0.06 * FINEST / levels
    assert float((p.argmax(1) == q.argmax(1)).float().mean()) > 0.85
    worse = torch.cat([losses(m, t) - losses(w, t) for m, w, t in zip(mine, wanted, prompts, strict=True)])
    assert float(worse.mean()) < allowed + 4 * math.sqrt(2 * allowed / len(worse))


@pytest.mark.cpu_forms
def test_it_still_knows_the_capital_of_france(real: Engine) -> None:
    assert "Paris" in answer(real, "What is the capital of France?")


@pytest.mark.cpu_forms
def test_a_sequence_is_the_same_bits_alone_and_in_a_ragged_batch(tiny_llama: Callable[..., Path]) -> None:
    layer = transformer_of(load_int8(tiny_llama())[0]).layers[0]
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x[7] *= 1e4
    for product in (layer.attention.qkv, layer.attention.o, layer.mlp.gate_up):
        whole = product(x)
        for begin, end in ((0, 1), (1, 8), (8, 50), (7, 8)):
            assert torch.equal(product(x[begin:end]), whole[begin:end])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_report_says_what_was_saved(tmp_path: Path, dtype: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "tie_word_embeddings": True}
    path = write_tiny_model(tmp_path / "model", **sizes)
    engine, report = load_int8(path, dtype)
    plain = loaded(path, dtype, max_context=256)
    assert engine.model is not None
    assert plain.model is not None
    assert (report.quantize, report.dtype) == ("int8", dtype)
    assert report.saved_mb == (plain.model.nbytes - engine.model.nbytes) // 2**20
    # Half of the layers; the head is one more matrix beside int8, and in some 16-bit forms the embedding itself.
    assert report.saved_mb > 0.25 * plain.model.nbytes / 2**20
    assert transformer_of(engine)._embedding.table.dtype == getattr(torch, dtype)
