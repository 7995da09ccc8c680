"""Files of a model: regular ones of a bounded size, or a clear refusal that comes at once."""

import os
import socket
from pathlib import Path

import pytest

from rbee_worker.errors import ModelMalformed, ModelNotFound
from rbee_worker.runtime.files import open_file, open_unbuffered, read_bytes, read_text


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.model"
    path.write_bytes(b"four")
    assert read_bytes(path, limit=4) == b"four"
    assert read_text(path, limit=4, hint="") == "four"
    with open_file(path) as stream, open_unbuffered(path) as raw:
        assert stream.read() == raw.read() == b"four"
    with pytest.raises(ModelMalformed, match=r"^a\.model is larger than 3 bytes, too large for what it should hold"):
        read_bytes(path, limit=3)
    path.write_bytes(b"ab\xff")
    with pytest.raises(ModelMalformed, match=r"^a\.model is not UTF-8 \(byte 2\)"):
        read_text(path, limit=4, hint="")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"x: no such file\.") as caught:
        read_bytes(tmp_path / "x", limit=3, hint="Get it.")
    assert caught.value.hint == "Get it."
    with pytest.raises(ModelMalformed, match=r": cannot be read: Is a directory\."):
        read_bytes(tmp_path, limit=3)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        for path, kind in (
            (tmp_path / "pipe", "a named pipe"),
            (tmp_path / "link", "a named pipe"),
            (tmp_path / "s", "a socket"),
            (Path("/dev/zero"), "a device"),
        ):
            with pytest.raises(ModelMalformed, match=rf": cannot be read: it is {kind}, not a regular file\."):
                read_bytes(path, limit=3)


def test_a_file_that_becomes_a_pipe_as_it_is_opened_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stat = tmp_path / "file", Path.stat
    path.write_bytes(b"x")

    def swapped(self: Path, **options: bool) -> os.stat_result:
        found = stat(self, **options)
        path.unlink()
        os.mkfifo(path)
        return found

    monkeypatch.setattr(Path, "stat", swapped)
    with pytest.raises(OSError, match="it is a named pipe"):
        open_file(path)
