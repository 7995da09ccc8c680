"""The schema of the events is that of today's dataclasses, and holds for every event that a snapshot has."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from rbee_worker import __version__
from rbee_worker.events import InferenceFailed, LoadFailed, to_dict
from tests import event_schema
from tests.snapshots.compare import HERE
from tests.snapshots.openapi import steady
from tests.unit.samples import JOB, LOAD

TYPES = {"<int>": 1, "<float>": 1.5, "<str>": "some text", "<bool>": True}
"""What stands in a snapshot for a value that varies."""

KEPT = json.loads(event_schema.PAGE.read_text("utf-8"))


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema_rs.meta.validate(KEPT)
    return jsonschema_rs.validator_for(KEPT)


def filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: filled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item) for item in value]
    return TYPES.get(value, value) if isinstance(value, str) else value


def recorded() -> Iterator[dict[str, Any]]:
    """The events of all snapshots."""
    for path in sorted(HERE.glob("loading/*.ndjson")):
        yield from map(json.loads, path.read_text("utf-8").splitlines())
    for path in sorted(HERE.glob("served/*.txt")):
        for text in re.findall(r'^data: (\{"(?:stage|event)":.*)$', path.read_text("utf-8"), re.MULTILINE):
            yield json.loads(text)


def test_the_kept_schema_is_that_of_the_dataclasses():
    # pydantic's versions differ in words that mean the same.
    assert steady(KEPT) == steady(event_schema.schema()), "run make docs"


def test_it_names_its_draft_its_version_and_what_it_describes():
    assert KEPT["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert KEPT["$id"] == f"urn:rbee-worker:{__version__}:events"
    assert KEPT["$defs"]["LoadingToVram"]["properties"]["layers_total"]["description"]
    assert "components" not in json.dumps(KEPT)


def test_every_recorded_event_holds(validator: Any):
    events = [filled(event) for event in recorded()]
    kinds = {event.get("stage") or event.get("event") for event in events}
    assert kinds >= {"resolving", "downloading", "loading_to_vram", "warming_up", "ready", "error", "cancelled"}
    assert kinds >= {"started", "token", "end", "prompt_logprobs"}
    for event in events:
        validator.validate(event)


@pytest.mark.parametrize("event", [*LOAD, *JOB], ids=lambda event: type(event).__name__)
def test_every_field_counts(validator: Any, event: Any):
    told = to_dict(event)
    validator.validate(told)
    validator.validate(told | {"new": {"anything": 1}})
    first = next(iter(told))
    for other in (told | {first: "unheard_of"}, {key: value for key, value in told.items() if key != first}):
        assert not validator.is_valid(other)


def test_wrong_types_and_missing_fields_do_not(validator: Any):
    told = to_dict(next(event for event in LOAD if event.stage == "loading_to_vram"))
    for key in told:
        assert not validator.is_valid(told | {key: [1]}), key
        assert not validator.is_valid({name: value for name, value in told.items() if name != key}), key


def test_the_two_errors_are_told_apart(validator: Any):
    validator.validate(to_dict(LoadFailed(code="X", message="y", seq=1, elapsed_seconds=0.5)))
    validator.validate(to_dict(InferenceFailed(code="X", message="y")))
