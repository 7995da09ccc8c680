"""What tests of hub models share: a hub that this process uses, and a download run to its end."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from rbee_worker.cancellation import Cancellation
from rbee_worker.runtime.hub import client, transfer
from rbee_worker.runtime.hub.client import HubModel
from rbee_worker.runtime.hub.download import Step, download
from tests.hub_server import HubServer, Repo, sha256, sharded_repo, tiny_repo

NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
WEIGHTS = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Repo]:
    base = tmp_path_factory.mktemp("repos")
    return {"org/tiny": tiny_repo(base / "tiny"), "org/sharded": sharded_repo(base / "sharded")}


@pytest.fixture
def hub(repos: dict[str, Repo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that this process's huggingface_hub uses, with an empty cache; pauses between tries are short."""
    with HubServer() as server:
        server.repos = {name: Repo(dict(repo.files)) for name, repo in repos.items()}
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(transfer, "RETRY_SECONDS", (0.01, 0.01, 0.01))
        monkeypatch.setattr(client, "LISTING_RETRY_SECONDS", (0.01, 0.01))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


def model_of(text: str) -> HubModel:
    repo, _, revision = text.partition("@")
    return HubModel(repo, revision or None, repo)


def fetch(
    text: str = "org/tiny", *, stall_seconds: float = 60, cancel: Cancellation | None = None
) -> tuple[Path | None, list[Step]]:
    """What a download returns, and its steps."""
    steps: list[Step] = []
    running = download(model_of(text), stall_seconds=stall_seconds, cancel=cancel)
    while True:
        try:
            steps.append(next(running))
        except StopIteration as end:
            return end.value, steps


def folder(text: str = "org/tiny") -> Path:
    found, _ = fetch(text)
    assert found is not None
    return found


def partials(tmp_path: Path) -> list[Path]:
    return list(tmp_path.rglob("*.incomplete"))


def partial_of(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "cache" / "models--org--tiny" / "blobs" / f"{sha256(data)}.incomplete"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def downloaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("download-", "hub-listing"))]
