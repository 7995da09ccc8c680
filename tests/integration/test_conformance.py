"""The worker's own stream, checked from outside by the program that checks any server's."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from .conftest import Served, serving


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rbee_worker.conformance", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def idle(tiny: Path):
    options = ("--no-load", "--keep-alive", "1", "--api-key", "sesame")
    with serving("--model", str(tiny), *options, wait=False) as worker:
        yield worker


def test_a_load_and_then_its_story(idle: Served, tiny: Path) -> None:
    asked = ("--addr", idle.url, "--keep-alive", "1", "--api-key", "sesame")
    nothing = check(*asked)
    assert (nothing.returncode, nothing.stderr) == (1, "")
    assert "503: nothing was loaded there, Retry-After" in nothing.stdout
    loaded = check(*asked, "--load", str(tiny))
    assert (loaded.returncode, loaded.stderr) == (0, ""), loaded.stdout
    assert "ok    load     accepted" in loaded.stdout
    watched = check(*asked, "--json")
    assert (watched.returncode, watched.stderr) == (0, ""), watched.stdout
    told = [json.loads(line) for line in watched.stdout.splitlines()]
    assert {one["subscriber"] for one in told} == {"first", "joined", "slow", "late", "leaving"}
    assert {one["check"] for one in told} >= {"seq", "counts", "[DONE]", "closed", "headers", "story", "same end"}


def test_without_the_key_and_without_the_model(idle: Served) -> None:
    assert "the stream was answered 401" in check("--addr", idle.url).stdout
    refused = check("--addr", idle.url, "--api-key", "sesame", "--load", "/etc/passwd")
    assert refused.returncode == 1
    assert "POST /v1/loading was answered 403" in refused.stdout


def test_what_was_recorded(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "recorded"
    path.write_bytes(httpx.get(f"{served.url}/v1/loading/progress").content)
    assert check("--file", str(path)).returncode == 0
    path.write_bytes(httpx.post(f"{served.url}/v1/inference", json={"prompt": "a", "max_tokens": 3}).content)
    assert check("--file", str(path)).returncode == 0
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert check("--file", str(path)).returncode == 1
