"""The kernels that a test runs: each variant that this machine has."""

import functools

import pytest

from rbee_worker.kernels.library import Kernels, Variant, built, supported


@functools.cache
def kernels(variant: Variant, threads: int = 2) -> Kernels:
    if not built(variant):
        pytest.skip(f"the kernels for {variant} were not built: no C++ compiler was found")
    if not supported(variant):
        pytest.skip(f"this CPU has no {variant}")
    return Kernels(variant, threads)


each_variant = pytest.mark.parametrize("variant", ["avx2", "avx512"])
"""Of the library: a test takes ``variant`` and asks for its :func:`kernels`."""
