"""``docs/events.schema.json``: a JSON Schema of all events, from their dataclasses. ``python -m tests.event_schema``.

It has the schemas that ``/openapi.json`` has, in a document of their own.
"""

import json
from pathlib import Path
from typing import Any

from rbee_worker import __version__
from rbee_worker.server.openapi.schemas import REF, event_schemas

PAGE = Path(__file__).parents[1] / "docs" / "events.schema.json"


def schema() -> dict[str, Any]:
    """The schema of one event: a line of ``--json``, or the data of a frame."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:rbee-worker:{__version__}:events",
        "title": f"Events of rbee-worker {__version__}",
        "description": (
            "One event: a line that `--json` writes, or the data of a frame that HTTP sends, but for `[DONE]`. "
            "Later versions may add events and fields: skip what you do not know."
        ),
        "oneOf": [{"$ref": "#/$defs/LoadingEvent"}, {"$ref": "#/$defs/InferenceEvent"}],
        "$defs": {name: _standing_alone(part) for name, part in sorted(event_schemas().items())},
    }


def _standing_alone(part: Any) -> Any:
    """The schema with references into this document, and without the word that only OpenAPI has."""
    if isinstance(part, list):
        return [_standing_alone(item) for item in part]
    if isinstance(part, dict):
        return {key: _standing_alone(item) for key, item in part.items() if key != "discriminator"}
    return part.replace(REF, "#/$defs/") if isinstance(part, str) else part


def page() -> str:
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
