"""What a conversion finds in its folder, and what a killed or refused one leaves there."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rbee_worker.errors import Conflict, InvalidRequest, ModelMalformed, RbeeError
from rbee_worker.runtime import convert as convert_module
from rbee_worker.runtime.convert import PARTIAL_NAME, ConvertProgress, convert
from rbee_worker.runtime.source import ModelSource, resolve

Folder = Callable[..., Path]

ALL_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- what is there already


def test_already_converted(tiny: ModelSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(convert(tiny, out))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    size = (out / "model.safetensors").stat().st_size
    assert list(convert(tiny, out)) == [ConvertProgress(11, 11, size, size, finished=True, already_converted=True)]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(InvalidRequest, match=r"out holds a conversion of tiny to auto") as caught:
        convert(tiny, out, dtype="float32")
    assert caught.value.exit_code == 2


def test_a_damaged_conversion_is_not_taken_for_whole(tiny: ModelSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(convert(tiny, out))
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InvalidRequest, match="out is not empty and not an earlier conversion"):
        convert(tiny, out)


def test_refuses_to_overwrite(tiny: ModelSource, model_folder: Folder, tmp_path: Path) -> None:
    theirs = model_folder("theirs")
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    with pytest.raises(InvalidRequest, match="theirs is not empty and not an earlier conversion") as caught:
        convert(tiny, theirs)
    assert caught.value.exit_code == 2
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidRequest, match="file is a file"):
        convert(tiny, file)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="other is not empty"):
        convert(tiny, other)


def test_an_empty_folder_is_fine(tiny: ModelSource, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert list(convert(tiny, tmp_path / "out"))[-1].finished
    assert names(tmp_path / "out") == ALL_FILES


# -- interruptions


def test_closing_early_leaves_nothing(tiny: ModelSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = convert(tiny, out)
    next(steps)
    next(steps)
    assert PARTIAL_NAME in names(out)
    assert "model.safetensors" not in names(out)
    steps.close()
    assert names(out) == []


def test_closing_after_the_last_step_keeps_all(tiny: ModelSource, tmp_path: Path) -> None:
    steps = convert(tiny, tmp_path / "out")
    while not next(steps).finished:
        pass
    steps.close()
    assert names(tmp_path / "out") == ALL_FILES


def test_a_killed_conversion_starts_over(tiny: ModelSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"""
        import os, signal
        from pathlib import Path
        from rbee_worker.runtime.convert import convert
        from rbee_worker.runtime.source import resolve
        for step in convert(resolve({str(tiny.path)!r}), Path({str(out)!r})):
            if step.tensors_done == 5:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert PARTIAL_NAME in names(out)
    assert "model.safetensors" not in names(out)
    with pytest.raises(RbeeError):
        _ = resolve(str(out)).checkpoint
    assert list(convert(tiny, out))[-1].finished
    assert names(out) == ALL_FILES
    fresh = tmp_path / "fresh"
    list(convert(tiny, fresh))
    assert (out / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()


def test_a_source_that_shrinks_meanwhile(tiny: ModelSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = convert(tiny, out)
    next(steps)
    os.truncate(tiny.path, tiny.path.stat().st_size // 2)
    with pytest.raises(ModelMalformed, match=r"tiny\.gguf: tensor '.*' ended after \d+ of \d+ bytes"):
        list(steps)
    assert names(out) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b'"data_offsets":[0,', b'"data_offsets":[4,', "offset"),
        (b'"shape":[', b'"shape":[9,', "header"),
        (b'"source":"tiny"', b'"source":"TINY"', "its header is another"),
    ],
)
def test_a_file_that_the_library_reads_otherwise_gets_no_name(
    tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, old: bytes, new: bytes, problem: str
) -> None:
    make = convert_module._header

    def damaged(*arguments: Any) -> bytes:
        text = make(*arguments)[8:]
        assert old in text
        text = text.replace(old, new, 1)
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    monkeypatch.setattr(convert_module, "_header", damaged)
    with pytest.raises(RbeeError, match=rf"{PARTIAL_NAME}: the file is not what was written: .*{problem}"):
        list(convert(tiny, tmp_path / "out"))
    assert names(tmp_path / "out") == []


def test_two_conversions_to_one_folder(tiny: ModelSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = convert(tiny, out), convert(tiny, out)
    next(first)
    with pytest.raises(Conflict, match="another conversion is writing there"):
        next(second)
    assert list(first)[-1].finished
    late = convert(tiny, tmp_path / "late")
    shutil.copytree(out, tmp_path / "late")
    with pytest.raises(Conflict, match="another conversion has just finished there"):
        next(late)
    assert names(tmp_path / "late") == ALL_FILES
    assert (tmp_path / "late" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_lock_goes_with_the_conversion(tiny: ModelSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with contextlib.closing(convert(tiny, out)) as steps:
        next(steps)
        with (out / PARTIAL_NAME).open("ab") as stream, pytest.raises(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert list(convert(tiny, out))[-1].finished


def test_a_full_disk(tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RbeeError, match=r"out: the conversion takes \d+ MB, but only 0 MB are free"):
        convert(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tiny: ModelSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RbeeError, match="Not a directory"):
        list(convert(tiny, tmp_path / "file" / "out"))


def test_a_wrong_tokenizer_is_refused_before_anything_is_written(model_folder: Folder, tmp_path: Path) -> None:
    source = resolve(str(model_folder(**{"tokenizer.json": b"{}"})))
    with pytest.raises(ModelMalformed, match="the tokenizers library refuses it"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
