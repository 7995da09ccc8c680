"""The events of loads, as ``--json`` prints them and SSE carries them: a load that succeeds, fails, is cancelled."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import constants

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig
from rbee_worker.errors import RbeeError
from rbee_worker.events import to_json
from rbee_worker.runtime.engine.engine import Engine
from tests.hub_server import HubServer, tiny_repo
from tests.snapshots.plain import transcript
from tests.tiny import write_tiny_model

# The same on every machine: one device, one dtype, and no word of stalling however slow it is.
ENGINE = EngineConfig(device="cpu", dtype="float32", stall_seconds=3600)


def take(folder: Path) -> dict[str, str]:
    """A transcript for each way that a load goes."""
    tiny = write_tiny_model(folder / "tiny")
    events = {
        "ready": _load(str(tiny)),
        "error": _load(str(cut(write_tiny_model(folder / "cut")))),
        "cancelled": _load(str(tiny), cancel_at="warming_up"),
        "downloaded": _downloaded(folder),
    }
    return {f"{name}.ndjson": transcript(told, folder) for name, told in events.items()}


def cut(model: Path) -> Path:
    """The model without the last bytes of its weights."""
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    return model


def _load(model: str, cancel_at: str = "") -> list[dict[str, Any]]:
    told, cancel = [], Cancellation()
    with suppress(RbeeError):  # its event is the last
        for event in Engine(ENGINE).load(model, cancel):
            told.append(json.loads(to_json(event)))
            if event.stage == cancel_at:
                cancel.set()
    return told


def _downloaded(folder: Path) -> list[dict[str, Any]]:
    with HubServer() as hub:
        hub.repos = {"org/tiny": tiny_repo(folder / "repo")}
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_TOKEN_PATH": str(folder / "token"),
            "HF_HUB_OFFLINE": False,
        }
        with mock.patch.multiple(constants, **settings):
            return _load("org/tiny")
