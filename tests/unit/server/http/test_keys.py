"""Which keys are accepted, whose they are, and what a file of them may hold."""

import hashlib

import pytest

from rbee_worker.errors import InvalidRequest
from rbee_worker.server.http.keys import ApiKeys


def default_name(key):
    return f"key-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def test_without_keys_there_are_none():
    assert not ApiKeys()
    assert ApiKeys().client(b"") is None


def test_a_key_is_known_by_the_start_of_its_digest():
    keys = ApiKeys(["first", " sécond "])
    assert len(keys) == 2
    assert keys.client(b"first") == default_name("first")
    assert keys.client("sécond".encode()) == default_name("sécond")
    assert keys.client(b"firs") is None
    assert keys.client(b"first ") is None


def test_the_same_key_twice_on_the_command_line_is_one():
    assert len(ApiKeys(["a", "a"])) == 1


def test_a_file_of_keys_with_and_without_names(tmp_path):
    file = tmp_path / "keys"
    file.write_text("\ufeff# ours\n\n k2 \nalice  sk-123\nalice sk-new\r\n", "utf-8")
    keys = ApiKeys(["k1"], file)
    assert [keys.client(key) for key in (b"k1", b"k2", b"sk-123", b"sk-new", b"alice", b"# ours")] == [
        default_name("k1"),
        default_name("k2"),
        "alice",
        "alice",
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"# none yet\n", "holds no key"),
        (b"", "holds no key"),
        (b"k1\n\na b c\n", "line 3 is neither"),
        (b"al=ice k\n", "line 1 is neither"),
        (b"k1\nk1\n", "given twice"),
        (b"given\n", "given twice"),
        (b"\xff\xfe", "not UTF-8: bad byte at position 0"),
        (None, "No such file"),
    ],
)
def test_a_file_that_will_not_do(tmp_path, content, reason):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=reason) as raised:
        ApiKeys(["given"], file)
    assert str(file) in raised.value.message
    assert raised.value.exit_code == 2


def test_an_empty_key_is_refused():
    with pytest.raises(InvalidRequest, match="a key is empty"):
        ApiKeys(["k", " "])


def test_reading_again(tmp_path):
    file = tmp_path / "keys"
    file.write_text("old")
    keys = ApiKeys(["given"], file)
    file.write_text("new")
    assert keys.client(b"new") is None
    keys.reload()
    assert keys.client(b"new") == default_name("new")
    assert keys.client(b"old") is None
    assert keys.client(b"given") == default_name("given")
    file.write_text("# emptied by mistake")
    with pytest.raises(InvalidRequest, match="holds no key"):
        keys.reload()
    assert keys.client(b"new") == default_name("new")
