"""What this machine's CPU can do: the one place that asks.

An operator that exists may still refuse to run here, so each one is tried once on a small matrix. The answers follow
what torch and its libraries may use: ``ATEN_CPU_CAPABILITY=avx2``, ``ONEDNN_MAX_CPU_ISA=AVX2`` and
``FBGEMM_ENABLE_INSTRUCTIONS=AVX2``, set before the start, make a CPU with AVX-512 answer like one without it.
"""

import functools
import warnings
from dataclasses import dataclass

import torch

from rbee_worker.errors import DeviceUnavailable
from rbee_worker.kernels.library import cpu_kernels, missing_reason
from rbee_worker.runtime.model.linear.int8 import LEVELS, REDUCED_LEVELS, fbgemm_product, plain_product


@dataclass(frozen=True, slots=True)
class CpuFeatures:
    """What the forms of linear layers need of a CPU.

    Attributes:
        kernels: the variant of the worker's own kernels that runs here; None: they were not built, or none runs.
        packed_fp16: FBGEMM multiplies by float16 weights in its own layout.
        packed_bf16: oneDNN multiplies bfloat16 by bfloat16 weights in its own layout.
        bf16_arithmetic: the processor multiplies bfloat16 itself, so that the packed form is fast as well.
        bf16_kernels: so do the worker's own kernels, as fast as oneDNN does.
        int8_levels: the largest magnitude of an 8-bit activation with which FBGEMM's integer sums are exact, 127 or
            63; None: FBGEMM is not there, or its sums are never exact.
    """

    kernels: str | None
    packed_fp16: bool
    packed_bf16: bool
    bf16_arithmetic: bool
    bf16_kernels: bool
    int8_levels: int | None


@functools.cache
def cpu_features() -> CpuFeatures:
    """Try what this CPU can do; the answer is kept for the life of the process."""
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    kernels = cpu_kernels()
    return CpuFeatures(
        kernels=kernels.variant if kernels is not None else None,
        packed_fp16=fbgemm,
        packed_bf16=_runs_packed_bf16(),
        bf16_arithmetic=_has_bf16_arithmetic(),
        bf16_kernels=kernels is not None and _has_bf16_kernels(kernels.variant),
        int8_levels=_exact_int8_levels() if fbgemm else None,
    )


def describe_kernels() -> str:
    """The worker's own kernels that run in this process, or why none do: ``avx512, 8 threads``. For people."""
    try:
        kernels = cpu_kernels()
    except DeviceUnavailable as error:
        return f"none. {error.message}"
    if kernels is None:
        return f"none. {missing_reason()}"
    return f"{kernels.variant}, {kernels.threads} thread{'s' if kernels.threads > 1 else ''}"


def _runs_packed_bf16() -> bool:
    """The operator may exist and refuse this CPU: it wants AVX-512 or the like."""
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    ops = torch.ops.mkldnn
    try:
        weight = ops._reorder_linear_weight(x, 1)  # noqa: SLF001  (no public name)
        ops._linear_pointwise(x, weight, None, "none", [], "")  # noqa: SLF001
    except (AttributeError, RuntimeError):
        return False
    return True


def _has_bf16_arithmetic() -> bool:
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("bf16", False):  # Arm
        return True
    # torch names what the processor has, also where it was told to use less.
    allowed: str = torch.backends.cpu.get_cpu_capability()
    return allowed.startswith("AVX512") and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _has_bf16_kernels(variant: str) -> bool:
    """Where the processor multiplies whole tiles (AMX), oneDNN is several times as fast."""
    capabilities = torch.cpu.get_capabilities()
    return variant == "avx512" and capabilities.get("avx512_bf16", False) and not capabilities.get("amx_bf16", False)


def _exact_int8_levels() -> int | None:
    """The arithmetic itself is asked: the worst case of each number of levels is multiplied out and compared."""
    values = torch.full((32, 64), LEVELS, dtype=torch.int8)
    values[1::2] = -LEVELS
    scale = torch.ones(32)
    try:
        with warnings.catch_warnings():
            # torch deprecates its quantized tensors, once per process, but packs from nothing else.
            warnings.simplefilter("ignore")
            for levels in (LEVELS, REDUCED_LEVELS):
                rows = torch.full((3, 64), float(levels))
                rows[1] = -levels
                if torch.equal(fbgemm_product(values, scale, levels)(rows), plain_product(values, scale)(rows)):
                    return levels
    except (AttributeError, RuntimeError):  # a torch that has dropped them
        return None
    return None
