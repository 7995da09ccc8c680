import pytest
import torch

from rbee_worker.runtime import linear
from rbee_worker.runtime.linear import LinearFormat, PackedFp16Linear, choose_format, make_linear

CPU = torch.device("cpu")
FORMATS = [
    LinearFormat("dense", torch.float32, torch.float32),
    LinearFormat("packed-fp16", torch.float16, torch.float32),
    LinearFormat("packed-bf16", torch.bfloat16, torch.bfloat16),
]


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.kernel)
def test_each_form_computes_the_product(form: LinearFormat, biased: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    bias = torch.randn(96, generator=generator) if biased else None
    x = torch.randn(rows, 64, generator=generator).to(form.activation_dtype)
    stored = weight.to(form.weight_dtype).double()
    exact = x.double() @ stored.T + (bias.to(form.activation_dtype).double() if bias is not None else 0)
    layer = make_linear(weight, bias, form)
    out = layer(x)
    assert out.dtype == form.activation_dtype
    assert relative_error(out, exact) < (4e-3 if form.kernel == "packed-bf16" else 1e-6)
    assert layer.nbytes >= weight.numel() * form.weight_dtype.itemsize


def test_a_matrix_packed_in_blocks_is_the_same_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = torch.randn(50, 16), torch.randn(50), torch.randn(3, 16)
    whole = PackedFp16Linear(weight, bias)(x)
    monkeypatch.setattr(linear, "_BLOCK_WEIGHTS", 16 * 7)
    assert torch.allclose(PackedFp16Linear(weight, bias)(x), whole, atol=1e-6)


def test_auto_never_takes_plain_bfloat16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_has_bf16_arithmetic", lambda: False)
    assert choose_format(CPU, "auto").kernel == "packed-fp16"
    monkeypatch.setattr(linear, "_has_packed_fp16", lambda: False)
    assert choose_format(CPU, "auto") == FORMATS[0]
    monkeypatch.setattr(linear, "_has_bf16_arithmetic", lambda: True)
    assert choose_format(CPU, "auto").kernel == "packed-bf16"


def test_an_asked_for_dtype_is_held() -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        assert choose_format(CPU, dtype).dtype_name == dtype
