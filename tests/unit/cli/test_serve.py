"""``serve``: what it hands to the server, which is a stand-in here."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from rbee_worker.config import EngineConfig, ServerConfig
from tests.unit.cli.harness import run


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerConfig, EngineConfig, str | None, bool]]:
    """What a stand-in for ``server.run.serve`` was called with; it returns 5."""
    calls: list[tuple[ServerConfig, EngineConfig, str | None, bool]] = []

    def serve(server: ServerConfig, engine: EngineConfig, model: str | None, *, load: bool) -> int:
        calls.append((server, engine, model, load))
        return 5

    module = ModuleType("rbee_worker.server.run")
    module.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rbee_worker.server.run", module)
    return calls


def test_serve_passes_its_options_and_its_exit_code(
    served: list[tuple[ServerConfig, EngineConfig, str | None, bool]], tmp_path: Path
):
    keys, cert, key = tmp_path / "keys", tmp_path / "cert", tmp_path / "key"
    args = ["--addr", "[::1]:0", "-m", "m", "--api-key", "k0", "--api-key", "k1", "--api-key-file", str(keys)]
    args += ["--trusted-host", "a.b", "--trusted-host", "*.c", "--cors-origin", "http://d", "--cors-origin", "*"]
    args += ["--tls-cert", str(cert), "--tls-key", str(key), "--max-connections", "7"]
    args += ["--allow-model", "a", "--allow-model", "b", "--max-queue", "3", "--max-batch-size", "4"]
    args += ["--prefill-chunk", "5", "--keep-alive", "0", "--shutdown-grace", "1.5", "--exit-on-load-error"]
    args += ["--allow-unauthenticated", "--no-load", "--device", "cpu", "--dtype", "float16", "--max-context", "99"]
    args += ["--quantize", "int8", "--mmap", "--trusted-proxy", "10.0.0.0/8", "--trusted-proxy", "::1"]
    args += ["--max-body", "1MiB", "--head-timeout", "2", "--body-timeout", "3", "--idle-timeout", "4"]
    args += ["--send-timeout", "5"]
    assert run("serve", *args, env={"RBEE_TLS_KEY_PASSWORD": "secret"}).exit_code == 5
    server = ServerConfig(
        host="::1",
        port=0,
        api_keys=("k0", "k1"),
        api_key_file=keys,
        allow_unauthenticated=True,
        trusted_hosts=("a.b", "*.c"),
        cors_origins=("http://d", "*"),
        tls_cert=cert,
        tls_key=key,
        tls_key_password="secret",  # noqa: S106 - of a test
        trusted_proxies=("10.0.0.0/8", "::1"),
        max_connections=7,
        max_body_bytes=2**20,
        header_seconds=2,
        body_seconds=3,
        idle_seconds=4,
        send_timeout_seconds=5,
        allow_models=("a", "b"),
        max_queue=3,
        keep_alive_seconds=0,
        shutdown_grace_seconds=1.5,
        exit_on_load_error=True,
    )
    engine = EngineConfig(
        device="cpu", dtype="float16", quantize="int8", mmap=True, max_context=99, max_batch_size=4, prefill_chunk=5
    )
    assert served == [(server, engine, "m", False)]


def test_serve_by_default(served: list[tuple[ServerConfig, EngineConfig, str | None, bool]]):
    run("serve")
    run("serve", env={"RBEE_API_KEY": "k0 k1", "RBEE_MODEL": "m"})
    assert served == [
        (ServerConfig(), EngineConfig(), None, True),
        (ServerConfig(api_keys=("k0", "k1")), EngineConfig(), "m", True),
    ]
