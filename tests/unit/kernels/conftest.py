from collections.abc import Callable

import pytest

from rbee_worker.kernels.formats import FORMATS, Format
from rbee_worker.kernels.library import Kernels, Variant
from tests.unit.kernels.matrices import MISSING, VARIANTS


@pytest.fixture(params=VARIANTS, scope="session")
def variant(request: pytest.FixtureRequest) -> Variant:
    """Each variant that was built and that this CPU runs."""
    if request.param in MISSING:
        pytest.skip(MISSING[request.param])
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def with_threads(variant: Variant) -> Callable[[int], Kernels]:
    """Kernels of so many threads, made once."""
    made: dict[int, Kernels] = {}

    def with_threads(threads: int) -> Kernels:
        if threads not in made:
            made[threads] = Kernels(variant, threads)
        return made[threads]

    return with_threads


@pytest.fixture(scope="session")
def kernels(with_threads: Callable[[int], Kernels]) -> Kernels:
    """Of two threads."""
    return with_threads(2)


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> Format:
    """Each format."""
    return FORMATS[request.param]
