"""JSON of strangers: one object within its bounds, or a clear refusal."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.errors import ModelError, ModelMalformed, ModelNotFound
from rbee_worker.runtime.untrusted import parse_json_object, read_json_object


def test_read_json_object_limits(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_json_object(path, limit=8) == {"a": 1}
    with pytest.raises(ModelMalformed, match=r"config\.json is larger than 7 bytes"):
        read_json_object(path, limit=7)
    with pytest.raises(ModelNotFound, match=r"other\.json: no such file"):
        read_json_object(tmp_path / "other.json")
    with pytest.raises(ModelMalformed, match="cannot be read: Is a directory"):
        read_json_object(tmp_path)


@given(raw=st.binary(max_size=60))
def test_any_bytes_are_a_json_object_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(parse_json_object(raw, what="x.json"), dict)
    except ModelError as error:
        assert error.message.startswith("x.json")  # noqa: PT017 (either outcome is right)
