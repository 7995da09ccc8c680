"""What operators rely on, over the real process: keys and certificates read again, TLS, signals, logs, figures."""

import json
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import trustme

from .conftest import PROGRAM, RawConnection, Served, environment, events_of, eventually, run, serving, start

INFER = "/v1/inference"
LONG = b'{"prompt":"x","max_tokens":1000,"ignore_eos":true}'


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def issue(authority: trustme.CA, folder: Path) -> tuple[Path, Path]:
    """A new certificate and key for 127.0.0.1, over what was there."""
    issued = authority.issue_cert("127.0.0.1")
    cert, key = folder / "worker.pem", folder / "worker.key"
    cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return cert, key


@pytest.fixture
def trusting(authority: trustme.CA) -> Iterator[httpx.Client]:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with httpx.Client(verify=context, timeout=60) as client:
        yield client


def test_keys_are_read_again_while_requests_run(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice old-key\n")
    with serving("--model", str(tiny), "--api-key-file", str(file), "--no-load", wait=False) as worker:

        def status(key: str) -> int:
            return httpx.get(f"{worker.url}/v1/worker", headers=bearer(key)).status_code

        started = httpx.post(f"{worker.url}/v1/loading", json={"model": str(tiny)}, headers=bearer("old-key"))
        assert started.status_code == 202
        eventually(lambda: httpx.get(f"{worker.url}/readyz").status_code == 200)
        stream = RawConnection(worker.address, "POST", INFER, LONG, Authorization="Bearer old-key")
        stream.read_until(b'"token"')
        file.write_text("alice new-key\n")
        worker.process.send_signal(signal.SIGHUP)
        eventually(lambda: status("new-key") == 200)
        assert status("old-key") == 401
        file.write_text("# emptied by mistake\n")
        worker.process.send_signal(signal.SIGHUP)
        line = eventually(lambda: [line for line in worker.log if "holds no key" in line])[0]
        assert str(file) in line
        assert "stays" in line
        assert status("new-key") == 200
        assert events_of(stream.finish().body)[-1]["stop_reason"] == "max_tokens"
        assert not any("-key\n" in line or "new-key" in line for line in worker.log)


def test_tls_streams_drains_and_takes_a_renewed_certificate(
    tiny: Path, tmp_path: Path, authority: trustme.CA, trusting: httpx.Client
) -> None:
    cert, key = issue(authority, tmp_path)
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--shutdown-grace", "0.2")
    with serving("--model", str(tiny), *options, wait=False) as worker:
        assert worker.url.startswith("https://")
        assert events_of(trusting.get(f"{worker.url}/v1/loading/progress").content)[-1]["stage"] == "ready"
        ca = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(str(ca))
        done = run(
            "generate", "--addr", worker.url, "--raw", "--prompt", "x", "--max-tokens", "3", SSL_CERT_FILE=str(ca)
        )
        assert done.returncode == 0, done.stderr

        before = served_serial(worker, authority)
        issue(authority, tmp_path)
        worker.process.send_signal(signal.SIGHUP)
        eventually(lambda: served_serial(worker, authority) != before)
        key.write_text("no key")
        worker.process.send_signal(signal.SIGHUP)
        eventually(lambda: [line for line in worker.log if "not a PEM file" in line])

        # ``trusting`` keeps an idle connection open; a stream runs beside it.
        with trusting.stream("POST", worker.url + INFER, content=LONG) as stream:
            lines = stream.iter_lines()
            assert '"started"' in next(lines)
            began = time.monotonic()
            worker.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"stop_reason":"cancelled"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert worker.process.wait(20) == 0
        assert time.monotonic() - began < 10


def test_an_idle_client_over_tls_does_not_hold_up_the_end(
    tmp_path: Path, authority: trustme.CA, trusting: httpx.Client
) -> None:
    cert, key = issue(authority, tmp_path)
    with serving("--no-load", "--tls-cert", str(cert), "--tls-key", str(key), wait=False) as worker:
        assert trusting.get(f"{worker.url}/health").status_code == 200  # its connection stays open, and nobody reads it
        with connected(worker, authority) as idle:
            idle.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert idle.recv(12) == b"HTTP/1.1 200"
            assert worker.stop() == 0
            while idle.recv(4096):  # raises where TLS was not ended in order
                pass
    assert not [line for line in worker.log if "ERROR" in line]  # uvicorn's, of connections that did not end


@contextmanager
def connected(worker: Served, authority: trustme.CA) -> Iterator[ssl.SSLSocket]:
    """A connection of its own."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    host, port = worker.url.removeprefix("https://").rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname=host, suppress_ragged_eofs=False) as sock,
    ):
        yield sock


def served_serial(worker: Served, authority: trustme.CA) -> str:
    """The serial number of the certificate that a new connection is shown."""
    with connected(worker, authority) as sock:
        return str(sock.getpeercert()["serialNumber"])


def test_a_wrong_option_ends_at_once_with_one_message() -> None:
    done = run("serve", "--addr", "127.0.0.1:0", "--no-load", "--tls-cert", "/nowhere.pem")
    assert done.returncode == 2
    assert done.stderr == "error: --tls-cert /nowhere.pem: No such file or directory.\n"


def test_a_key_file_is_enough_to_bind_any_address(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("k\n")
    with start("serve", "--addr", "0.0.0.0:0", "--no-load", "--api-key-file", str(file)) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "listening on http://0.0.0.0:" in line
        assert httpx.get(f"http://127.0.0.1:{line.strip().rpartition(':')[2]}/livez").status_code == 200
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(20) == 0


def test_a_second_signal_ends_a_drain_at_once(tiny: Path) -> None:
    with serving("--model", str(tiny), "--shutdown-grace", "300") as worker:
        stream = RawConnection(worker.address, "POST", INFER, LONG.replace(b"1000", b"4000"))
        stream.read_until(b'"token"')
        worker.process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{worker.url}/health").json()["state"] == "draining")
        assert worker.stop(signal.SIGTERM) == 128 + signal.SIGTERM
        stream.close()


def test_idle_connections_do_not_hold_a_shutdown(tiny: Path) -> None:
    with serving("--model", str(tiny)) as worker, httpx.Client() as idle:
        assert idle.get(f"{worker.url}/livez").status_code == 200
        began = time.monotonic()
        assert worker.stop() == 0
        assert time.monotonic() - began < 5


def test_the_figures_and_the_log_of_a_real_worker(tiny: Path) -> None:
    with serving("--model", str(tiny), "--log-format", "json") as worker:
        prompt = "SECRETTEXT one two three four five six seven eight nine ten " * 4
        for job_id in ("j", "k"):
            tokens_out = worker.infer(prompt=prompt, max_tokens=5, ignore_eos=True, job_id=job_id)[-1]["tokens_out"]
            assert tokens_out == 5

        def sample(name: str) -> float:
            page = httpx.get(f"{worker.url}/metrics").text
            return next(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name + " "))

        assert sample('rbee_requests_total{stop_reason="max_tokens"}') == 2
        assert sample("rbee_generation_tokens_total") == 10
        assert sample("rbee_prompt_tokens_total") == sample("rbee_request_prompt_tokens_sum") > 40
        assert sample("rbee_time_to_first_token_seconds_count") == 2
        assert sample("rbee_batch_size_count") == sample("rbee_engine_steps_total") >= 10
        assert sample("rbee_prefix_cache_hits_total") > 0
        computed = sample("rbee_prefill_tokens_total") + sample("rbee_prefix_cache_hits_total")
        assert computed == sample("rbee_prompt_tokens_total")
        assert sample('rbee_kv_cache_blocks{state="cached"}') > 0
        assert sample('rbee_device_memory_size_bytes{device="cpu"}') > 0
        assert sample("rbee_requests_running") == 0

        def line() -> dict[str, object] | None:
            found = [json.loads(line) for line in worker.log if "access" in line and INFER in line]
            return found[0] if found else None

        fields = eventually(line)
        wanted = {"level": "info", "status": 200, "job_id": "j", "tokens_out": 5, "stop_reason": "max_tokens"}
        assert wanted.items() <= fields.items()
        assert {"correlation_id", "ms", "client", "tokens_in"} <= fields.keys()
        assert not any("SECRETTEXT" in line for line in worker.log)


@contextmanager
def unread(model: Path, *options: str) -> Iterator[Served]:
    """A worker whose stderr is a pipe that nobody reads any more once the address is known and the model is there."""
    with start("serve", "--addr", "127.0.0.1:0", "--model", str(model), *options) as process:
        assert process.stderr is not None
        try:
            found = re.search(r"http://[\w.:]+", process.stderr.readline())
            assert found
            worker = Served(process, found[0], [])
            assert worker.events()[-1]["stage"] == "ready"
            yield worker
        finally:
            process.kill()


def ask_often(worker: Served, count: int) -> None:
    """Requests that make far more log than a pipe holds: one after the other, but sent without waiting for answers."""
    with socket.create_connection(worker.address, timeout=60) as connection, connection.makefile("rb") as answers:
        for begin in range(0, count, 100):
            heads = [f"GET /none/{n:04d}/{'x' * 180} HTTP/1.1\r\nHost: 127.0.0.1" for n in range(begin, begin + 100)]
            connection.sendall("".join(f"{head}\r\n\r\n" for head in heads).encode())
            missing = len(heads)
            while missing:
                line = answers.readline()
                assert line, "the connection was closed"
                missing -= line.count(b"HTTP/1.1 404")


def lines_lost(worker: Served) -> int:
    page = httpx.get(f"{worker.url}/metrics").text
    return int(float(re.findall(r"^rbee_log_lines_dropped_total (\S+)$", page, re.MULTILINE)[0]))


def test_a_reader_of_the_log_who_stops_reading_costs_lines_and_no_service(tiny: Path) -> None:
    with unread(tiny, "--log-format", "json") as worker:
        ask_often(worker, 2500)
        lost = eventually(lambda: lines_lost(worker))
        assert lost > 0
        assert worker.infer(prompt="x", max_tokens=5, ignore_eos=True)[-1]["tokens_out"] == 5
        # Who reads again finds every line in its order, and where some are missing how many.
        log = worker.process.stderr
        assert log is not None
        seen, notice = [], None
        while notice is None:
            line = json.loads(log.readline())
            notice = line.get("lines_lost")
            seen += [int(line["message"].split("/")[2])] if "/none/" in line["message"] else []
        assert seen == list(range(len(seen)))
        assert len(seen) < 2500
        assert notice >= lost
        threading.Thread(target=log.read, daemon=True).start()
        httpx.get(f"{worker.url}/none/again")
        assert lines_lost(worker) == notice
        assert worker.stop() == 0


def test_a_worker_whose_log_nobody_reads_drains_and_ends(tiny: Path) -> None:
    with unread(tiny, "--log-level", "debug", "--shutdown-grace", "30") as worker:
        ask_often(worker, 600)
        stream = RawConnection(worker.address, "POST", INFER, LONG, Accept="text/event-stream")
        stream.read_until(b'"event":"token"')
        worker.process.send_signal(signal.SIGTERM)
        assert events_of(stream.finish().body)[-1]["event"] == "end"
        assert worker.process.wait(60) == 0


def test_a_second_signal_ends_a_worker_whose_log_nobody_reads(tiny: Path) -> None:
    with unread(tiny, "--shutdown-grace", "60") as worker:
        ask_often(worker, 600)
        stream = RawConnection(worker.address, "POST", INFER, LONG, Accept="text/event-stream")
        stream.read_until(b'"event":"token"')
        worker.process.send_signal(signal.SIGINT)
        eventually(lambda: httpx.get(f"{worker.url}/readyz").status_code == 503)
        assert worker.stop(signal.SIGINT) == 130
        stream.close()


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2> >(exec true)"])
def test_a_worker_without_a_stderr_to_write_to_serves(tiny: Path, stderr: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f'exec "$0" serve --addr 127.0.0.1:{port} --model "$1" {stderr}'
    with subprocess.Popen(["bash", "-c", line, PROGRAM, str(tiny)], env=environment()) as process:
        try:
            worker = Served(process, f"http://127.0.0.1:{port}", [])
            eventually(lambda: ready(worker))
            assert worker.infer(prompt="x", max_tokens=3, ignore_eos=True)[-1]["tokens_out"] == 3
            assert lines_lost(worker) > 0
            assert worker.stop() == 0
        finally:
            process.kill()


def ready(worker: Served) -> bool:
    try:
        return httpx.get(f"{worker.url}/readyz").status_code == 200
    except httpx.TransportError:
        return False
