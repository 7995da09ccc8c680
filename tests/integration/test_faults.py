"""What goes wrong around a load, and what is left afterwards: nothing."""

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx

from tests.tiny import damage_normalizer, write_tiny_model

from .conftest import SECONDS, RawConnection, Served, environment, events_of, eventually, serving

PROGRESS = "/v1/loading/progress"
GET_PROGRESS = b"GET /v1/loading/progress HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


def sockets(worker: Served) -> int:
    """Open sockets: what connections would leak, and nothing that the load itself opens on its way."""
    links = Path(f"/proc/{worker.process.pid}/fd").iterdir()
    return sum(1 for link in links if link.is_symlink() and str(link.readlink()).startswith("socket:"))


def descriptors(worker: Served) -> int:
    return len(list(Path(f"/proc/{worker.process.pid}/fd").iterdir()))


def threads(worker: Served) -> set[str]:
    """Names of the worker's own threads; torch's and asyncio's pools keep theirs on purpose."""
    folder = Path(f"/proc/{worker.process.pid}/task")
    names = {(task / "comm").read_text().strip() for task in folder.iterdir()}
    return {name for name in names if name.startswith(("loader", "weight-reader"))}


FEW_FILES = """
import resource, sys
from rbee_worker.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.argv[1:] = ["serve", "--addr", "127.0.0.1:0", "--model", sys.argv[1]]
main()
"""


def test_more_silent_clients_than_descriptors(tiny: Path) -> None:
    with serving(command=[sys.executable, "-c", FEW_FILES, str(tiny)]) as worker:
        before = len(worker.log)
        silent = [socket.create_connection(worker.address) for _ in range(128)]
        for _ in range(20):
            assert httpx.get(f"{worker.url}/livez", timeout=SECONDS).status_code == 200
        assert worker.infer(prompt="Hi", max_tokens=1)[-1]["event"] == "end"
        assert descriptors(worker) < 64
        assert len(worker.log) - before < 10
        for client in silent:
            client.close()


def test_a_thousand_watchers_all_get_the_end(gguf_path: Path) -> None:
    async def watch(address: tuple[str, int]) -> bytes:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(GET_PROGRESS)
        data = await reader.read()
        writer.close()
        return data

    async def all_of_them(address: tuple[str, int]) -> list[bytes]:
        return await asyncio.gather(*(watch(address) for _ in range(1000)))

    with serving("--model", str(gguf_path), wait=False) as worker:
        # The event loop has opened its own by the time it answers.
        assert httpx.get(f"{worker.url}/livez").status_code == 200
        before = sockets(worker)
        answers = asyncio.run(all_of_them(worker.address))
        assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
        assert all(answer.count(b'"stage":"ready"') == 1 for answer in answers)
        assert all(answer.count(b"data: [DONE]") == 1 for answer in answers)
        eventually(lambda: sockets(worker) <= before)
        assert worker.infer(prompt="Hi", max_tokens=1)[-1]["event"] == "end"


def test_a_watcher_that_never_reads_holds_nothing_up(gguf_path: Path) -> None:
    with serving("--model", str(gguf_path), wait=False) as worker:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(worker.address)
        deaf.sendall(GET_PROGRESS)
        assert worker.events()[-1]["stage"] == "ready"
        assert worker.infer(prompt="Hi", max_tokens=1)[-1]["event"] == "end"
        assert worker.stop(signal.SIGTERM) == 0
        deaf.close()


def test_loads_that_fail_or_are_cancelled_leave_no_descriptor_and_no_thread(
    tiny: Path, gguf_path: Path, tmp_path: Path
) -> None:
    options = ("--allow-model", str(gguf_path), "--allow-model", str(tmp_path / "gone"))
    with serving("--model", str(tiny), *options) as worker:
        before = descriptors(worker)
        with httpx.Client(base_url=worker.url, timeout=SECONDS) as client:
            for _ in range(5):
                assert client.post("/v1/loading", json={"model": str(gguf_path)}).status_code == 202
                watcher = RawConnection(worker.address, "GET", PROGRESS)
                watcher.read_until(b'"loading_to_vram"')
                client.delete("/v1/loading")
                assert events_of(watcher.finish().body)[-1]["stage"] == "cancelled"
                assert client.post("/v1/loading", json={"model": str(tmp_path / "gone")}).status_code == 202
                assert events_of(client.get(PROGRESS).text)[-1]["stage"] == "error"
        eventually(lambda: descriptors(worker) <= before)
        eventually(lambda: not threads(worker))
        assert worker.infer(prompt="x", max_tokens=2)[-1]["tokens_out"] == 2


OUT_OF_MEMORY = """
import resource, sys
from rbee_worker.config import EngineConfig
from rbee_worker.runtime.engine.engine import Engine

engine = Engine(EngineConfig(device="cpu", dtype="float32", max_context=256))
for event in engine.load(sys.argv[1]):
    pass
engine.unload()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 64 * 2**20, resource.RLIM_INFINITY))
try:
    for event in engine.load(sys.argv[2]):
        pass
except Exception as error:
    print(type(error).__name__, event.stage, event.code, error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for event in engine.load(sys.argv[1]):
    pass
print(event.stage)
"""


def test_memory_that_runs_out_in_mid_load_is_one_clear_error(tiny: Path, model_dir: Path) -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(tiny), str(model_dir)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=environment(MALLOC_ARENA_MAX="2"), check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("OutOfMemory error OUT_OF_MEMORY Memory ran out while loading")
    assert second == "ready"


def test_a_load_that_panics_ends_and_the_next_one_works(tiny: Path, tmp_path: Path) -> None:
    bad = damage_normalizer(write_tiny_model(tmp_path / "bad"))
    with serving("--model", str(bad), "--allow-model", str(tiny), wait=False) as worker:
        end = worker.events()[-1]
        assert (end["stage"], end["code"]) == ("error", "MODEL_MALFORMED")
        assert "tokenizer.json" in end["message"]
        assert end["message"].isprintable()
        health = httpx.get(f"{worker.url}/health")
        assert (health.status_code, health.json()["state"]) == (503, "failed")
        assert httpx.delete(f"{worker.url}/v1/loading").status_code == 404
        assert httpx.post(f"{worker.url}/v1/loading", json={"model": str(tiny)}).status_code == 202
        assert worker.events()[-1]["stage"] == "ready"
        # Beside a resident model the same.
        assert httpx.post(f"{worker.url}/v1/loading", json={"model": str(bad)}, timeout=SECONDS).status_code == 202
        assert worker.events()[-1]["code"] == "MODEL_MALFORMED"
        assert worker.infer(prompt="x", max_tokens=2)[-1]["event"] == "end"
        assert httpx.post(f"{worker.url}/v1/unload", timeout=SECONDS).status_code == 200
        assert worker.stop() == 0


def test_a_load_that_panics_ends_the_process_where_that_was_asked_for(tmp_path: Path) -> None:
    bad = damage_normalizer(write_tiny_model(tmp_path / "bad"))
    with serving("--model", str(bad), "--exit-on-load-error", wait=False) as worker:
        assert worker.process.wait(SECONDS) == 3


def test_a_text_over_which_the_tokenizer_panics_is_an_error_without_the_text(tmp_path: Path) -> None:
    model = damage_normalizer(write_tiny_model(tmp_path / "bad"), in_use=True)
    with serving("--model", str(model)) as worker:
        for path, body in (("/v1/inference", {"prompt": "secret"}), ("/tokenize", {"text": "secret"})):
            answer = httpx.post(worker.url + path, json=body, timeout=SECONDS)
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "INFERENCE_FAILED"
            assert "secret" not in answer.text
        assert httpx.get(f"{worker.url}/readyz").status_code == 200
        assert not [line for line in worker.log if "secret" in line]
        assert worker.stop() == 0
