"""What users rely on is as the files say; the comparison sees every kind of change."""

from pathlib import Path

import pytest

from tests.snapshots.compare import HERE, RULE, differences, write
from tests.snapshots.groups import GROUPS
from tests.snapshots.openapi import steady
from tests.snapshots.plain import plain, transcript


@pytest.mark.parametrize("group", GROUPS)
def test_what_users_rely_on_is_as_it_was(group: str, tmp_path: Path):
    changes = differences(HERE / group, GROUPS[group](tmp_path))
    if changes:
        pytest.fail(f"\n{changes}", pytrace=False)


def test_every_folder_is_a_group():
    assert {path.name for path in HERE.iterdir() if path.is_dir()} - {"__pycache__"} == GROUPS.keys()


def test_files_that_changed_came_or_went_are_told(tmp_path: Path):
    folder = tmp_path / "group"
    write(folder, {"a": "1\n2\n", "b": "same\n", "gone": "x\n"})
    assert differences(folder, {"a": "1\n2\n", "b": "same\n", "gone": "x\n"}) == ""
    told = differences(folder, {"a": "1\n3\n", "b": "same\n", "new": "y\n"})
    for part in ("-2\n+3\n", "--- group/gone\n+++ /dev/null", "--- /dev/null\n+++ group/new", RULE):
        assert part in told
    assert "same" not in told
    write(folder, {"new": "y\n"})
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_names_order_types_and_null_are_seen(tmp_path: Path):
    def shown(event):
        return transcript([event], tmp_path)

    event = {"event": "end", "tokens_out": 1, "stop_reason": "eos"}
    assert shown(event) == shown(event | {"tokens_out": 2})
    for other in (
        event | {"tokens_out": 1.0},
        event | {"tokens_out": None},
        event | {"stop_reason": "max_tokens"},
        event | {"new": 1},
        {"event": "end", "stop_reason": "eos"},
        dict(reversed(event.items())),
    ):
        assert shown(event) != shown(other)


def test_counts_are_shown_once_however_many_came(tmp_path: Path):
    first = {"stage": "loading_to_vram", "seq": 1, "layers_loaded": 1}
    last = {"stage": "loading_to_vram", "seq": 2, "layers_loaded": 2, "eta_seconds": 0.0}
    done = {"stage": "ready", "seq": 3}
    assert transcript([first, last, done], tmp_path) == transcript([last, done], tmp_path)
    assert transcript([done, done], tmp_path) == transcript([done], tmp_path)


def test_identifiers_and_folders_are_masked(tmp_path: Path):
    value = {"id": f"chatcmpl-{'0a' * 16}", "model": f"{tmp_path}/tiny", "job": "123e4567-e89b-12d3-a456-426614174000"}
    assert plain(value, tmp_path) == {"id": "chatcmpl-<hex>", "model": "<folder>/tiny", "job": "<uuid>"}


def test_sentences_may_be_put_better_and_words_for_programs_may_not(tmp_path: Path):
    assert plain({"message": "It is wrong.", "reason": "max_tokens"}, tmp_path) == {
        "message": "<str>",
        "reason": "max_tokens",
    }


def test_what_pydantics_versions_write_differently_is_the_same():
    old = {"additionalProperties": True, "required": ["b", "a"], "x": {"const": "c", "enum": ["c"], "type": "string"}}
    assert steady(old) == {"required": ["a", "b"], "x": {"const": "c"}}
    assert steady({"additionalProperties": False}) == {"additionalProperties": False}
