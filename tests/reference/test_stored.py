"""GGUF files that run as they are stored, against the same files decoded to float32."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from torch.nn import functional

from rbee_worker.kernels.formats import FORMATS, quantize_activations
from rbee_worker.kernels.library import cpu_kernels, missing_reason
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.formats.gguf.families import ARCHITECTURES
from rbee_worker.runtime.inspection import inspect_model
from rbee_worker.runtime.model.linear.linear import DenseLinear, Linear
from rbee_worker.runtime.model.linear.stored import StoredLinear
from rbee_worker.runtime.model.moe import Experts
from rbee_worker.runtime.source import resolve
from tests.engines import loaded
from tests.unit.kernels.matrices import make_matrix, set_scales

from .conftest import answer
from .families import Case
from .test_families import fill, prompts_of
from .test_gguf_families import write
from .test_logits import logits_of, relative_error, transformer_of

pytestmark = [
    pytest.mark.cpu_forms,
    pytest.mark.skipif(cpu_kernels() is None, reason=f"the kernels do not run here: {missing_reason()}"),
]

CASE = Case("Qwen2", {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64})
EXPERTS = Case(
    "Qwen3Moe",
    {
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "head_dim": 64,
    },
)
ALIKE = 2e-2
"""Where float32 sums differ in their last bits, an activation may be rounded to the next byte."""

SCALES = {Type.Q4_K: (4e-4, 3e-3), Type.Q5_K: (2e-4, 3.1e-3), Type.Q6_K: (7.5e-5,)}
"""With these, blocks of any bytes are weights around 0 of about 0.1; ``gguf`` quantizes the other types itself."""


def blocks(kind: Type, rows: int, columns: int, seed: int) -> np.ndarray[Any, Any]:
    if kind not in SCALES:
        return gguf.quantize(np.random.default_rng(seed).normal(0, 0.1, (rows, columns)).astype(np.float32), kind)
    matrix = make_matrix(FORMATS[kind.name], rows, columns, seed)
    set_scales(matrix.format, matrix.data, torch.tensor(SCALES[kind]))
    return matrix.data.numpy()


def stored(path: Path, *types: Type, case: Case = CASE) -> Path:
    """A file whose matrices are stored in the given types, in turn."""
    matrices = 0

    def store(name: str, tensor: Tensor) -> tuple[np.ndarray[Any, Any], Type | None]:
        nonlocal matrices
        if tensor.dim() == 1 or name.endswith("mlp.gate.weight"):  # routers stay float32
            return tensor.numpy(), None
        kind = types[matrices % len(types)]
        matrices += 1
        *count, rows, columns = tensor.shape  # of experts, a number of matrices
        data = blocks(kind, math.prod(count) * rows, columns, seed=matrices)
        return data.reshape(*count, rows, -1), kind

    arch = next(name for name, known in ARCHITECTURES.items() if known.name == case.architecture)
    return write(path, arch, fill(case).eval(), store)


def logits(engine: Engine) -> Tensor:
    return torch.cat(logits_of(transformer_of(engine), prompts_of(CASE)))


def experts_of(engine: Engine) -> list[Experts]:
    return [layer.mlp for layer in transformer_of(engine).layers if isinstance(layer.mlp, Experts)]


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Tensor]:
    """Logits of the weights decoded to float32, where every linear layer rounds its activations as the kernels do."""

    routers: list[Linear] = []

    def rounded(layer: DenseLinear, x: Tensor) -> Tensor:
        exact = any(layer is router for router in routers)
        return functional.linear(x if exact else quantize_activations(x).float(), layer.weight, layer.bias)

    def of(path: Path) -> Tensor:
        engine = loaded(path, "float32")
        routers.extend(experts.router for experts in experts_of(engine))
        monkeypatch.setattr(DenseLinear, "__call__", rounded)
        return logits(engine)

    return of


@pytest.mark.parametrize(
    "types",
    [(Type.Q8_0,), (Type.Q4_0,), (Type.Q4_1,), (Type.Q4_K,), (Type.Q5_K,), (Type.Q6_K,), (Type.Q4_K, Type.Q6_K)],
    ids=lambda types: "+".join(kind.name for kind in types),
)
def test_blocks_are_multiplied_as_they_are_stored(
    types: tuple[Type, ...], tmp_path: Path, twin: Callable[[Path], Tensor]
) -> None:
    path = stored(tmp_path / "model.gguf", *types)
    as_stored = loaded(path, "auto", kv_cache_dtype="float32")
    assert relative_error(logits(as_stored), twin(path)) < ALIKE
    matrices = sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)
    assert matrices < transformer_of(as_stored).nbytes < 1.05 * matrices + 2**16
    inspected = inspect_model(resolve(str(path)), None)
    need = inspected.memory[0]
    assert (need.dtype, need.weights_bytes) == ("as stored", transformer_of(as_stored).nbytes)


@pytest.mark.parametrize(
    "types", [(Type.Q8_0,), (Type.Q4_K, Type.Q6_K)], ids=lambda types: "+".join(kind.name for kind in types)
)
def test_experts_are_multiplied_as_they_are_stored(
    types: tuple[Type, ...], tmp_path: Path, twin: Callable[[Path], Tensor]
) -> None:
    path = stored(tmp_path / "model.gguf", *types, case=EXPERTS)
    as_stored = loaded(path, "auto", kv_cache_dtype="float32")
    ours, expected = logits(as_stored), twin(path)
    apart = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert apart.quantile(0.9) < ALIKE  # a token that hardly prefers one expert to another may go to that one
    matrices = sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)
    assert matrices < transformer_of(as_stored).nbytes < 1.05 * matrices + 2**16


@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_of_experts_that_no_token_chooses_no_byte_counts(
    kind: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their numbers are made no numbers: a product that read one of them would be none either."""
    engine = loaded(stored(tmp_path / "model.gguf", kind, case=EXPERTS), "auto")
    used: set[int] = set()
    plain = StoredLinear.__call__

    def noted(layer: StoredLinear, x: Tensor) -> Tensor:
        used.add(id(layer))
        return plain(layer, x)

    monkeypatch.setattr(StoredLinear, "__call__", noted)
    prompts = [[7], [7, 9, 11]]
    before = torch.cat(logits_of(transformer_of(engine), prompts))
    matrices = [matrix for experts in experts_of(engine) for pair in experts.experts for matrix in pair]
    idle = [matrix for matrix in matrices if id(matrix) not in used]
    assert 0 < len(idle) < len(matrices)
    for matrix in idle:
        spoil(matrix)
    assert torch.equal(torch.cat(logits_of(transformer_of(engine), prompts)), before)
    spoil(next(matrix for matrix in matrices if id(matrix) in used))
    assert torch.cat(logits_of(transformer_of(engine), prompts)).isnan().any()


def spoil(matrix: Linear) -> None:
    assert isinstance(matrix, StoredLinear)
    for part in matrix.part.weights.matrices:
        part.data.view(torch.uint8).fill_(0xFF)  # of a float16, of a scale too: not a number


def test_the_default_model_runs_as_it_is_stored_and_knows_the_capital_of_france(gguf_path: Path) -> None:
    engine = Engine()
    *_, ready = engine.load(str(gguf_path))
    assert (ready.report.runs_as, ready.report.kernel) == ("Q4_1, Q8_0", cpu_kernels().variant)
    assert ready.report.cpu_kernels.startswith(f"{cpu_kernels().variant}, ")
    inspected, cache = inspect_model(resolve(str(gguf_path)), None), transformer_of(engine).cache
    assert inspected.runs_as == "Q4_1, Q8_0"
    assert inspected.memory[0].kv_cache_bytes * cache.positions == cache.nbytes * inspected.context_length
    assert ready.report.device_mb["cpu"] * 2**20 < 1.1 * gguf_path.stat().st_size
    assert "Paris" in answer(engine, "What is the capital of France?")


def test_a_type_without_a_kernel_is_decoded_and_that_is_said(tmp_path: Path) -> None:
    path = stored(tmp_path / "model.gguf", Type.Q8_0, Type.Q5_0)
    engine = Engine()
    *_, ready = engine.load(str(path))
    assert ready.report.runs_as == "Q8_0, float16 (Q5_0 decoded: no kernel multiplies by it)"
    assert inspect_model(resolve(str(path)), None).runs_as == ready.report.runs_as
    exact = logits(loaded(path, "float32"))
    assert 1e-3 < relative_error(logits(engine), exact) < 0.12  # bytes for activations, in a model of random weights


@pytest.mark.parametrize("wanted", [{"dtype": "float16"}, {"dtype": "auto", "quantize": "int8"}])
def test_what_is_asked_for_is_done(wanted: dict[str, Any], tmp_path: Path) -> None:
    engine = loaded(stored(tmp_path / "model.gguf", Type.Q4_0), **wanted)
    assert not transformer_of(engine).form.as_stored


def test_a_token_reads_all_but_the_stored_embedding(tmp_path: Path) -> None:
    path = stored(tmp_path / "model.gguf", Type.Q4_K, Type.Q6_K)
    model = loaded(path, "auto").model
    sizes = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors}
    assert model.nbytes - model.bytes_per_token == sizes["token_embd.weight"]


def test_beside_the_kernels_torch_has_one_thread_while_a_step_runs(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for dtype, threads in (("auto", 1), ("float32", 2)):
            model = transformer_of(loaded(stored(tmp_path / "model.gguf", Type.Q8_0), dtype))
            with model.threads():
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
