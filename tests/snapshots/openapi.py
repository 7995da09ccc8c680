"""The whole of ``/openapi.json``, without what depends on the version of the package or of pydantic."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from rbee_worker import __version__
from rbee_worker.config import EngineConfig, ServerConfig
from rbee_worker.server.app import create_app
from rbee_worker.worker.worker import Worker


def take(_folder: Path) -> dict[str, str]:
    """The document, keys sorted."""
    document = json.loads(asyncio.run(_fetched()))
    assert document["info"]["version"] == __version__
    document["info"]["version"] = "<version>"
    return {"openapi.json": json.dumps(steady(document), indent=2, sort_keys=True, ensure_ascii=False) + "\n"}


async def _fetched() -> bytes:
    app = create_app(Worker(EngineConfig()), ServerConfig())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        answer = await client.get("/openapi.json")
    assert answer.status_code == 200
    return answer.content


def steady(value: Any) -> Any:
    """What pydantic's versions write in several ways, written in one.

    Some say ``additionalProperties: true``, which goes without saying; some put ``enum`` or ``type`` beside ``const``;
    the order of ``required`` means nothing.
    """
    if isinstance(value, list):
        return [steady(item) for item in value]
    if not isinstance(value, dict):
        return value
    left = {key: steady(item) for key, item in value.items() if (key, item) != ("additionalProperties", True)}
    if isinstance(left.get("const"), str):
        left = {key: item for key, item in left.items() if (key, item) not in _beside(left["const"])}
    if isinstance(left.get("required"), list):
        left["required"] = sorted(left["required"])
    return left


def _beside(const: str) -> list[tuple[str, Any]]:
    return [("enum", [const]), ("type", "string")]
