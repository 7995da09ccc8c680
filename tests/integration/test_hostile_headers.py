"""Headers made to keep the process busy: a worker told to load one answers all the while, and ends when told."""

import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from .conftest import SECONDS, events_of, serving

METADATA = 3_000_000


def dimensions(count: int) -> bytes:
    return b'{"x":{"dtype":"F32","shape":[' + b"9," * count + b'9],"data_offsets":[0,0]}}'


def endless_dimensions() -> bytes:
    """One tensor, in a header as long as the format allows."""
    return dimensions(49_000_000)


def many_dimensions() -> bytes:
    """One tensor, in a header that is parsed."""
    return dimensions(1_000_000)


def huge_dimensions() -> bytes:
    """One tensor, with sizes of thousands of digits."""
    return b'{"x":{"dtype":"F32","shape":[' + (b"9" * 4000 + b",") * 8000 + b'9],"data_offsets":[0,0]}}'


def much_metadata() -> bytes:
    return b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(METADATA)) + b"}}"


def with_header(model: Path, copy: Path, header: bytes) -> Path:
    """The model with another header."""
    shutil.copytree(model, copy)
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return copy


HEADERS = (endless_dimensions, many_dimensions, huge_dimensions, much_metadata)


@pytest.mark.parametrize("header", HEADERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("resident", [False, True], ids=["at start", "beside a model"])
def test_a_hostile_header_is_refused_while_the_worker_answers(
    tiny: Path, tmp_path: Path, header: Callable[[], bytes], *, resident: bool
) -> None:
    path = with_header(tiny, tmp_path / "hostile", header())
    start = ("--model", str(tiny), "--allow-model", str(path)) if resident else ("--model", str(path))
    with serving(*start, wait=resident) as worker:
        alive: list[int] = []
        ended = threading.Event()

        def ask() -> None:
            with httpx.Client(timeout=10) as client:
                while True:  # once at least, however soon the load ends
                    alive.append(client.get(f"{worker.url}/livez").status_code)
                    if ended.wait(0.01):
                        return

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            if resident:
                answer = httpx.post(f"{worker.url}/v1/loading", json={"model": str(path)}, timeout=SECONDS)
                assert answer.status_code == 202
            last = events_of(httpx.get(f"{worker.url}/v1/loading/progress", timeout=SECONDS).text)[-1]
        finally:
            ended.set()
            asking.join()
        assert (last["stage"], last["code"]) == ("error", "MODEL_MALFORMED")
        assert last["message"].startswith("model.safetensors: ")
        assert set(alive) == {200}
        assert httpx.get(f"{worker.url}/v1/ready", timeout=10).json()["ready"] is resident
        assert worker.stop(signal.SIGTERM) == 0
