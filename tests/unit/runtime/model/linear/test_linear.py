from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rbee_worker.errors import ModelUnsupported
from rbee_worker.runtime.model.linear import cpu, linear
from rbee_worker.runtime.model.linear.cpu import CpuFeatures, cpu_features
from rbee_worker.runtime.model.linear.int8 import (
    Int8Linear,
    fbgemm_product,
    hadamard,
    int_mm_product,
    plain_product,
    quantize_rows,
    quantize_weight,
    rotate,
)
from rbee_worker.runtime.model.linear.linear import (
    WIDEN_ROWS,
    DenseLinear,
    LinearFormat,
    PackedFp16Linear,
    WidenedLinear,
    choose_format,
    make_linear,
)
from rbee_worker.runtime.model.linear.stored import StoredLinear

pytestmark = pytest.mark.cpu_forms

CPU = torch.device("cpu")
FORMATS = [
    LinearFormat("dense", torch.float32, torch.float32),
    LinearFormat("widened", torch.float16, torch.float16),
    LinearFormat("widened", torch.bfloat16, torch.bfloat16),
    LinearFormat("packed-fp16", torch.float16, torch.float32),
    LinearFormat("packed-bf16", torch.bfloat16, torch.bfloat16),
    *(
        LinearFormat(variant, dtype, torch.float32)
        for variant in ("avx2", "avx512")
        for dtype in (torch.float16, torch.bfloat16)
    ),
]
INT8_KERNELS = ["packed-int8", "int8", "plain-int8"]
NOTHING = CpuFeatures(
    kernels=None,
    packed_fp16=False,
    packed_bf16=False,
    bf16_arithmetic=False,
    bf16_kernels=False,
    int8_levels=None,
)
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative errors of a product whose result is rounded to a dtype: half a unit in the last place."""

needs_fbgemm = pytest.mark.skipif(
    cpu_features().int8_levels is None, reason="FBGEMM's int8 product is not there or not exact"
)


def form_name(form: LinearFormat) -> str:
    return f"{form.kernel}-{form.dtype_name}"


def runs_here(form: LinearFormat) -> bool:
    features = cpu_features()
    if form.native:
        return form.kernel == features.kernels
    return {"packed-bf16": features.packed_bf16, "packed-fp16": features.packed_fp16}.get(form.kernel, True)


def skip_unless_here(form: LinearFormat) -> None:
    if not runs_here(form):
        pytest.skip(f"this CPU does not run {form.kernel}")


def pretend(monkeypatch: pytest.MonkeyPatch, features: CpuFeatures) -> None:
    monkeypatch.setattr(linear, "cpu_features", lambda: features)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm`` as CUDA documents it: int8 by int8 to int32, and the sizes that it refuses."""
    assert a.shape[0] > 16
    assert all(size % 8 == 0 for size in (*a.shape, *b.shape))
    assert a.dtype == b.dtype == torch.int8
    return (a.long() @ b.long()).int()


def int8_linear(weight: Tensor, bias: Tensor | None, kernel: str) -> Int8Linear:
    """With the finest activations that the kernel multiplies exactly here."""
    levels = cpu_features().int8_levels if kernel == "packed-int8" else None
    return Int8Linear(weight, bias, kernel, levels or 127)


@pytest.fixture(params=INT8_KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each int8 kernel; CUDA's is given its product in plain arithmetic."""
    if request.param == "packed-int8" and cpu_features().int8_levels is None:
        pytest.skip("FBGEMM's int8 product is not there or not exact")
    monkeypatch.setattr(torch, "_int_mm", exact_int_mm)
    return str(request.param)


@pytest.mark.parametrize("rows", [1, 3, WIDEN_ROWS - 1, WIDEN_ROWS, 40])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=form_name)
def test_each_form_computes_the_product(form: LinearFormat, biased: bool, rows: int) -> None:
    skip_unless_here(form)
    weight = normal(96, 64)
    x = normal(rows, 64, seed=1).to(form.weight_dtype).to(form.activation_dtype)  # to which some CPUs round it
    bias = normal(96, seed=2) if biased else None
    stored = weight.to(form.weight_dtype).double()
    exact = x.double() @ stored.T + (bias.to(form.activation_dtype).double() if bias is not None else 0)
    layer = make_linear(weight, bias, form)
    out = layer(x)
    assert out.dtype == form.activation_dtype
    assert relative_error(out, exact) < ROUNDING[form.activation_dtype]
    assert layer.nbytes >= weight.numel() * form.weight_dtype.itemsize


def test_a_matrix_widened_in_blocks_is_the_same_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = normal(50, 16).bfloat16(), normal(50, seed=1).bfloat16(), normal(20, 16, seed=2).bfloat16()
    whole = WidenedLinear(weight, bias)(x)
    monkeypatch.setattr(linear, "_WIDENED_WEIGHTS", 16 * 7)
    assert torch.equal(WidenedLinear(weight, bias)(x), whole)


def test_a_matrix_packed_in_blocks_is_the_same_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = torch.randn(50, 16), torch.randn(50), torch.randn(3, 16)
    whole = PackedFp16Linear(weight, bias)(x)
    monkeypatch.setattr(linear, "BLOCK_WEIGHTS", 16 * 7)
    assert torch.allclose(PackedFp16Linear(weight, bias)(x), whole, atol=1e-6)


def test_auto_takes_what_the_cpu_does_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, NOTHING)
    assert choose_format(CPU, "auto") == FORMATS[0]
    pretend(monkeypatch, replace(NOTHING, packed_fp16=True, packed_bf16=True))
    assert choose_format(CPU, "auto").kernel == "packed-fp16"
    pretend(monkeypatch, replace(NOTHING, packed_fp16=True, packed_bf16=True, bf16_arithmetic=True))
    assert choose_format(CPU, "auto").kernel == "packed-bf16"
    # The operator exists in every build of torch for x86; a CPU without AVX-512 refuses it when it is called.
    pretend(monkeypatch, replace(NOTHING, packed_fp16=True, bf16_arithmetic=True))
    assert choose_format(CPU, "auto").kernel == "packed-fp16"


def test_auto_leaves_weights_as_they_are_stored_where_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, replace(NOTHING, kernels="avx2", packed_fp16=True))
    half, brain = (LinearFormat("avx2", dtype, torch.float32) for dtype in (torch.float16, torch.bfloat16))
    assert choose_format(CPU, "auto") == half
    assert choose_format(CPU, "auto", stored={"BF16": 100, "F16": 10, "F32": 1}) == brain
    assert choose_format(CPU, "auto", stored={"BF16": 10, "F16": 100}) == half
    assert choose_format(CPU, "auto", stored={"Q4_K": 100, "Q6_K": 10, "F32": 1}) == replace(half, as_stored=True)
    assert choose_format(CPU, "auto", stored={"Q2_K": 100, "F32": 1}) == half  # no kernel multiplies by it
    assert choose_format(CPU, "float16", stored={"Q4_K": 100}) == half
    assert choose_format(CPU, "auto", "int8", {"Q4_K": 100}).quantize == "int8"
    assert choose_format(CPU, "float32", stored={"Q4_K": 100}).kernel == "dense"


def test_a_cpu_that_multiplies_bfloat16_itself_does_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, replace(NOTHING, kernels="avx512", packed_bf16=True, bf16_arithmetic=True))
    assert choose_format(CPU, "auto", stored={"BF16": 1}).kernel == "packed-bf16"
    assert choose_format(CPU, "auto", stored={"BF16": 1}, mapped=True).kernel == "avx512"  # packed ones are a copy
    assert choose_format(CPU, "auto", stored={"BF16": 1, "Q8_0": 100}).kernel == "avx512"


def test_the_kernels_do_so_where_onednn_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    both = replace(NOTHING, kernels="avx512", packed_bf16=True, bf16_arithmetic=True, bf16_kernels=True)
    pretend(monkeypatch, both)
    assert choose_format(CPU, "auto", stored={"BF16": 1}).kernel == "avx512"
    assert choose_format(CPU, "bfloat16").kernel == "avx512"


@pytest.mark.parametrize(
    ("names", "variant", "has"),
    [
        ({"avx512_bf16"}, "avx512", True),
        ({"avx512_bf16"}, "avx2", False),
        ({"avx512_bf16", "amx_bf16"}, "avx512", False),  # oneDNN's tiles are faster
        ({"avx512_vnni"}, "avx512", False),
    ],
)
def test_the_kernels_multiply_bfloat16_by_an_instruction(
    monkeypatch: pytest.MonkeyPatch, names: set[str], variant: str, has: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
    monkeypatch.setattr(cpu, "cpu_kernels", lambda: SimpleNamespace(variant=variant))
    assert cpu_features.__wrapped__().bf16_kernels is has


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cpu_without_a_packed_form_widens(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    pretend(monkeypatch, NOTHING)
    form = choose_format(CPU, dtype)
    assert (form.kernel, form.dtype_name, form.packed) == ("widened", dtype, False)


@pytest.mark.parametrize("error", [RuntimeError("bf16 path needs the cpu support avx512bw"), AttributeError("gone")])
def test_an_operator_that_refuses_to_run_is_not_there(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_reorder_linear_weight=refuse))
    assert cpu_features.__wrapped__().packed_bf16 is False


@pytest.mark.parametrize(
    ("names", "allowed", "has"),
    [
        ({"avx512_bf16"}, "AVX512", True),
        ({"amx_bf16"}, "AVX512", True),
        ({"avx512_bf16"}, "AVX2", False),  # hidden by ATEN_CPU_CAPABILITY
        ({"avx512_vnni"}, "AVX512", False),
        ({"bf16"}, "DEFAULT", True),  # Arm
    ],
)
def test_bfloat16_arithmetic_is_what_the_processor_has_and_may_use(
    monkeypatch: pytest.MonkeyPatch, names: set[str], allowed: str, has: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: allowed)
    assert cpu_features.__wrapped__().bf16_arithmetic is has


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_an_asked_for_dtype_is_held(quantize: str) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        form = choose_format(CPU, dtype, quantize)
        assert (form.dtype_name, form.quantize) == (dtype, quantize)


def test_a_form_knows_the_bytes_of_a_matrix() -> None:
    forms = [
        *FORMATS,
        choose_format(CPU, "auto", "int8"),
        LinearFormat("int8", torch.float16, torch.float16, quantize="int8"),
    ]
    for form in filter(runs_here, forms):
        layer = make_linear(normal(96, 64).to(form.weight_dtype), None, form)
        assert layer.nbytes == form.linear_bytes(96, 64)
        assert form.packed is not isinstance(layer, (DenseLinear, StoredLinear))


# -- int8


def test_quantized_rows_are_the_nearest_multiples_of_their_scale() -> None:
    x = normal(5, 33)
    for levels in (127, 63):
        rows, scale = quantize_rows(x, levels)
        assert torch.equal(rows, rows.round())
        assert torch.equal(rows.abs().amax(1), torch.full((5,), float(levels)))
        assert float(((rows * scale - x).abs() / scale).max()) <= 0.5 + 1e-4


def test_a_row_of_zeros_stays_zero(kernel: str) -> None:
    weight = normal(16, 64)
    weight[3] = 0
    out = int8_linear(weight, None, kernel)(torch.stack((torch.zeros(64), torch.ones(64))))
    assert torch.equal(out[0], torch.zeros(16))
    assert float(out[1, 3]) == 0
    assert bool(out[1, :3].isfinite().all())


@pytest.mark.parametrize(("columns", "size"), [(2048, 64), (576, 64), (96, 32), (100, 4), (33, 1)])
def test_rotations_are_orthogonal_up_to_their_size(columns: int, size: int) -> None:
    matrix = hadamard(columns, CPU)
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))
    assert torch.equal(matrix, matrix.T)


def test_what_is_rotated_is_exact_in_float32() -> None:
    rotation = hadamard(64, CPU)
    x = torch.stack((rotation[5], normal(64)))  # the first: every term at its largest, and of one sign
    fine, _ = quantize_rows(x, 2**17 - 1)
    assert torch.equal(rotate(fine, rotation).long(), fine.long() @ rotation.long())


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (40, 2048), (24, 200), (17, 33)], ids=str)
def test_int8_computes_the_product(kernel: str, shape: tuple[int, int], biased: bool, rows: int) -> None:
    weight, x = normal(*shape), normal(rows, shape[1], seed=1)
    bias = normal(shape[0], seed=2) if biased else None
    layer = int8_linear(weight, bias, kernel)
    exact = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    assert relative_error(layer(x), exact) < 127 / layer.levels * 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_keep_their_dtype(kernel: str, dtype: torch.dtype) -> None:
    weight, x = normal(96, 64), normal(3, 64, seed=1).to(dtype)
    out = int8_linear(weight, normal(96, seed=2), kernel)(x)
    assert out.dtype == dtype
    assert relative_error(out, int8_linear(weight, normal(96, seed=2), kernel)(x.float()).double()) < 4e-3


def test_a_row_is_the_same_bits_alone_in_a_batch_and_beside_outliers(kernel: str) -> None:
    layer = int8_linear(normal(96, 1600), normal(96, seed=2), kernel)
    x = normal(37, 1600, seed=1) * torch.logspace(-6, 6, 37)[:, None]
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x), alone)
    assert torch.equal(layer(x[5:22]), alone[5:22])
    broken = [torch.full((1, 1600), value) for value in (1e30, 1e-38, float("nan"), float("inf"))]
    assert not bool(layer(torch.cat(broken[2:])).isfinite().any())
    assert torch.equal(layer(torch.cat((*broken[:2], x, *broken[2:])))[2:-2], alone)
    assert torch.equal(layer(torch.cat((*broken[2:], x, *broken[:2])))[2:-2], alone)


@pytest.mark.parametrize("columns", [64, 576, 2500])
def test_the_products_are_exact(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (40, columns), generator=generator, dtype=torch.int8)
    values[0], values[1] = 127, -127
    scale = torch.rand(40, generator=generator)
    for levels in (127, 63):
        rows = torch.randint(-levels, levels + 1, (21, columns), generator=generator).float()
        rows[0], rows[1] = levels, -levels
        exact = (rows.long() @ values.long().T).float() * scale
        assert torch.equal(plain_product(values, scale)(rows), exact)
        if levels <= (cpu_features().int8_levels or 0):
            assert torch.equal(fbgemm_product(values, scale, levels)(rows), exact)


@pytest.mark.parametrize("rows", [1, 16, 24, 25, 100])
def test_cuda_products_are_padded_to_what_it_takes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", exact_int_mm)
    values, scale = quantize_weight(normal(48, 64), hadamard(64, CPU))
    r, _ = quantize_rows(normal(rows, 64, seed=1), 127)
    assert torch.equal(int_mm_product(values, scale)(r), plain_product(values, scale)(r))


def saturating_product(values: Tensor, _scale: Tensor, levels: int) -> Callable[[Tensor], Tensor]:
    """``fbgemm_product`` on a CPU without VNNI: pairs of unsigned by signed products are added in 16 bits."""

    def multiply(rows: Tensor) -> Tensor:
        terms = (rows.long() + levels + 1)[:, None] * values.long()
        pairs = (terms[..., ::2] + terms[..., 1::2]).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(-1) - (levels + 1) * values.long().sum(-1)).float()

    return multiply


@pytest.mark.parametrize("broken", [AttributeError, RuntimeError])
def test_the_levels_are_those_that_the_processor_multiplies_exactly(
    monkeypatch: pytest.MonkeyPatch, broken: type[Exception]
) -> None:
    def missing(*_: object) -> None:
        raise broken

    ask = cpu_features.__wrapped__
    if cpu_features().int8_levels is not None:
        monkeypatch.setattr(cpu, "fbgemm_product", saturating_product)
        assert ask().int8_levels == 63
        monkeypatch.setattr(cpu, "fbgemm_product", missing)
        assert ask().int8_levels is None
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=["qnnpack"]))
    assert (ask().int8_levels, ask().packed_fp16) == (None, False)


def test_int4_needs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, NOTHING)
    monkeypatch.setattr(linear, "missing_reason", lambda: "RBEE_KERNELS is torch.")
    for value, hint in (("torch", "Without RBEE_KERNELS they are on. "), ("auto", "")):
        monkeypatch.setenv("RBEE_KERNELS", value)
        with pytest.raises(ModelUnsupported, match=r"needs the worker's own CPU kernels\. RBEE_KERNELS is") as raised:
            choose_format(CPU, "auto", "int4")
        assert raised.value.advice() == f"{hint}Use quantize=int8 or quantize=none."
    monkeypatch.setattr(linear, "missing_reason", lambda: None)
    with pytest.raises(ModelUnsupported, match="int4 does not run on cuda") as raised:
        choose_format(torch.device("cuda"), "auto", "int4")
    assert raised.value.advice() == "Use quantize=int8 or quantize=none or device=cpu."
    pretend(monkeypatch, replace(NOTHING, kernels="avx2"))
    form = choose_format(CPU, "auto", "int4", {"BF16": 9})
    assert (form.kernel, form.weight_dtype, form.as_stored) == ("avx2", torch.bfloat16, False)


@pytest.mark.parametrize(
    ("quantize", "file", "kept"),
    [
        ("int8", {"Q8_0": 9}, ["Q4_0", "Q4_K", "Q6_K", "Q8_0"]),
        ("int4", {"Q8_0": 9, "Q4_0": 1}, ["Q4_0", "Q4_K"]),
        ("int4", {"Q4_K": 7, "Q6_K": 3}, ["Q4_0", "Q4_K", "Q6_K", "Q8_0"]),
        ("int4", {"Q6_K": 9}, ["Q4_0", "Q4_K"]),
    ],
)
def test_blocks_of_a_file_stay_unless_they_are_wider_than_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, quantize: Any, file: dict[str, int], kept: list[str]
) -> None:
    pretend(monkeypatch, replace(NOTHING, kernels="avx2"))
    form, wanted = choose_format(CPU, "auto", quantize, file), {"int8": "Q8_0", "int4": "Q4_K"}[quantize]
    for name in ("Q4_0", "Q4_K", "Q6_K", "Q8_0"):
        held = form.blocks_of(name, 512)
        assert held is not None
        assert held.name == name if name in kept else held.name == wanted
    for other in ("F16", "Q5_0"):
        found = form.blocks_of(other, 512)
        assert found is not None
        assert found.name == wanted
    table = form.blocks_of("Q6_K", 512, table=True)
    assert table is not None
    assert table.name == "Q6_K"


def test_int8_runs_everywhere_but_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_format(torch.device("cuda"), "float16", "int8").kernel == "int8"
    pretend(monkeypatch, replace(NOTHING, int8_levels=63))
    assert choose_format(CPU, "auto", "int8") == LinearFormat("packed-int8", torch.float16, torch.float32, 63, "int8")
    pretend(monkeypatch, NOTHING)
    assert choose_format(CPU, "auto", "int8") == LinearFormat("plain-int8", torch.float16, torch.float32, 127, "int8")
    with pytest.raises(ModelUnsupported, match="int8 does not run on mps"):
        choose_format(torch.device("mps"), "auto", "int8")


@needs_fbgemm
def test_seven_bits_give_the_same_from_either_product() -> None:
    weight, x = normal(96, 1600), normal(9, 1600, seed=1)
    packed = Int8Linear(weight, None, "packed-int8", 63)
    plain = Int8Linear(weight, None, "plain-int8", 63)
    assert torch.equal(packed(x), plain(x))


def test_auto_holds_the_embedding_beside_int8_in_the_finer_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, replace(NOTHING, packed_bf16=True, bf16_arithmetic=True))
    assert choose_format(CPU, "auto", "int8").dtype_name == "float16"
    assert choose_format(CPU, "bfloat16", "int8").dtype_name == "bfloat16"
