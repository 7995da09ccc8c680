"""Transfers: cut, refused for now, spoilt, without room, silent, cancelled; against a hub on this machine."""

import errno
import io
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from huggingface_hub import constants

from rbee_worker.cancellation import Cancellation
from rbee_worker.errors import DiskFull, ModelError, ModelMalformed, ModelNotFound, RbeeError
from rbee_worker.runtime.formats.safetensors import INDEX_NAME
from rbee_worker.runtime.hub import download as download_module
from rbee_worker.runtime.hub import transfer
from rbee_worker.runtime.hub.download import DownloadProgress, DownloadStalled, download
from rbee_worker.runtime.hub.transfer import Transfer
from tests.hub_server import LISTING, HubServer, git_sha1, sha256
from tests.unit.runtime.hub.case import NEEDED, WEIGHTS, downloaders, fetch, folder, model_of, partial_of, partials

# -- cuts


@pytest.mark.parametrize("name", [LISTING, "config.json", "tokenizer.json", WEIGHTS])
@pytest.mark.parametrize("after", [0, 100])
def test_a_cut_connection_is_resumed(hub: HubServer, name: str, after: int) -> None:
    hub.cut(name, after)
    path = folder()
    assert (path / WEIGHTS).read_bytes() == hub.repos["org/tiny"].files[WEIGHTS]
    ranges = [asked.range for asked in hub.gets(name)]
    assert ranges == [None, None if name == LISTING or after == 0 else "bytes=100-"]


def test_a_cut_while_the_file_is_put_in_place(hub: HubServer) -> None:
    hub.cut_heads(WEIGHTS)
    assert (folder() / WEIGHTS).exists()
    assert len(hub.gets(WEIGHTS)) == 1


def test_a_connection_cut_again_and_again_gets_there(hub: HubServer) -> None:
    size = len(hub.repos["org/tiny"].files[WEIGHTS])
    hub.always_cut(WEIGHTS, size // 9)
    assert (folder() / WEIGHTS).stat().st_size == size
    assert len(hub.gets(WEIGHTS)) == 10  # more than the tries that may fail in a row


def test_a_server_that_gives_nothing_more_ends_it(hub: HubServer, tmp_path: Path) -> None:
    hub.cut(WEIGHTS, 1000)
    hub.always_cut(WEIGHTS, 0)
    size = len(hub.repos["org/tiny"].files[WEIGHTS])
    message = rf"^org/tiny/{WEIGHTS}: the download broke off 4 times in a row at 1,000 of {size:,} bytes: .*goes on"
    with pytest.raises(ModelNotFound, match=message):
        fetch()
    assert [path.stat().st_size for path in partials(tmp_path)] == [1000]
    hub.mend()
    _, steps = fetch()
    assert isinstance(steps[0], DownloadProgress)
    assert steps[0].bytes_downloaded == steps[0].bytes_total - size + 1000
    assert hub.gets(WEIGHTS)[-1].range == "bytes=1000-"
    assert partials(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(hub: HubServer, status: int) -> None:
    hub.refuse(WEIGHTS, status, times=2, Retry_After="0")
    hub.refuse(LISTING, status)
    assert (folder() / WEIGHTS).exists()


def test_retry_after_is_kept(hub: HubServer) -> None:
    hub.refuse("config.json", 429, Retry_After="1")
    began = time.monotonic()
    fetch()
    assert time.monotonic() - began >= 1


def test_a_server_without_ranges(hub: HubServer, tmp_path: Path) -> None:
    hub.ranges = False
    hub.cut(WEIGHTS, 1000)
    _, steps = fetch()
    counts = [step.bytes_downloaded for step in steps if isinstance(step, DownloadProgress)]
    assert counts == sorted(counts)
    assert partials(tmp_path) == []


@pytest.mark.parametrize("extra", [0, 1])
def test_partial_files_of_any_size(hub: HubServer, tmp_path: Path, extra: int) -> None:
    data = hub.repos["org/tiny"].files[WEIGHTS]
    partial_of(tmp_path, data).write_bytes(data + bytes(extra))
    assert (folder() / WEIGHTS).read_bytes() == data
    assert len(hub.gets(WEIGHTS)) == extra  # a whole one needs no request, a longer one is no use


def test_a_server_that_refuses_the_range_sends_the_file_from_its_beginning(hub: HubServer, tmp_path: Path) -> None:
    data = hub.repos["org/tiny"].files[WEIGHTS]
    partial_of(tmp_path, data).write_bytes(data[:1000])
    hub.refuse(WEIGHTS, 416)
    assert (folder() / WEIGHTS).read_bytes() == data
    assert [asked.range for asked in hub.gets(WEIGHTS)] == ["bytes=1000-", None]


def test_more_bytes_than_listed(hub: HubServer, tmp_path: Path) -> None:
    data = hub.repos["org/tiny"].files[WEIGHTS]
    hub.send(WEIGHTS, data + b"x")
    message = rf"^org/tiny/{WEIGHTS}: the hub lists {len(data):,} bytes and sends more\. .*Load it again"
    with pytest.raises(ModelMalformed, match=message):
        fetch()
    assert partials(tmp_path) == []
    hub.mend()
    assert (folder() / WEIGHTS).read_bytes() == data


def test_a_server_that_sends_without_end_is_left(hub: HubServer, tmp_path: Path) -> None:
    data = hub.repos["org/tiny"].files[WEIGHTS]
    hub.send(WEIGHTS, data + bytes(2**20))
    hub.hold(WEIGHTS, len(data) + 2**19)  # the end never comes
    with pytest.raises(ModelMalformed, match="sends more"):
        fetch()
    assert partials(tmp_path) == []


def test_fewer_bytes_than_listed(hub: HubServer, tmp_path: Path) -> None:
    data = hub.repos["org/tiny"].files[WEIGHTS]
    hub.send(WEIGHTS, data[:-1])
    with pytest.raises(ModelNotFound, match=f"the connection ended after {len(data) - 1:,} of {len(data):,} bytes"):
        fetch()
    assert [path.stat().st_size for path in partials(tmp_path)] == [len(data) - 1]


# -- digests


@pytest.mark.parametrize(("name", "digest"), [(WEIGHTS, "SHA-256"), ("config.json", "Git SHA-1")])
def test_other_bytes_than_listed(hub: HubServer, tmp_path: Path, name: str, digest: str) -> None:
    data = hub.repos["org/tiny"].files[name]
    hub.send(name, bytes(len(data)))
    expected, got = (sha256, git_sha1)[name == "config.json"], bytes(len(data))
    message = rf"^org/tiny/{name}: what arrived .*: {digest} {expected(got)}, expected {expected(data)}\. .*removed"
    with pytest.raises(ModelMalformed, match=message):
        fetch()
    assert not list((tmp_path / "cache").rglob(name))
    hub.mend()
    assert (folder() / name).read_bytes() == data


def test_a_damaged_partial_file_is_found_out(hub: HubServer, tmp_path: Path) -> None:
    partial_of(tmp_path, hub.repos["org/tiny"].files[WEIGHTS]).write_bytes(bytes(5000))
    with pytest.raises(ModelMalformed, match="SHA-256"):
        fetch()
    assert partials(tmp_path) == []


def test_a_mirror_whose_etags_are_no_digests(hub: HubServer, tmp_path: Path) -> None:
    hub.bare, hub.etags = True, "other"
    data = hub.repos["org/tiny"].files[WEIGHTS]
    assert (folder() / WEIGHTS).read_bytes() == data
    assert (tmp_path / "cache" / "models--org--tiny" / "blobs" / f"v1_{sha256(data)[:8]}").exists()


# -- the disk


def test_too_little_space_is_said_before_a_byte(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: usage(free=1000))
    total = sum(len(hub.repos["org/tiny"].files[name]) for name in NEEDED)
    with pytest.raises(DiskFull, match=rf"^org/tiny: {total:,} bytes .* and 1,000 bytes are free in .*cache") as caught:
        fetch()
    assert "HF_HOME" in str(caught.value.hint)
    assert hub.fetched() == set()


class usage:  # noqa: N801 (stands for shutil's named tuple)
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_disk_that_fills_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Small(io.FileIO):
        def write(self, data: Any) -> int:
            room = 50_000 - self.tell()
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:room])

    monkeypatch.setattr(transfer, "FileIO", Small)
    left = len(hub.repos["org/tiny"].files[WEIGHTS]) - 50_000
    with pytest.raises(DiskFull, match=rf"^org/tiny/{WEIGHTS}: {left:,} bytes are still to be fetched"):
        fetch()
    assert [path.stat().st_size for path in partials(tmp_path)] == [50_000]
    monkeypatch.undo()


def test_a_file_that_cannot_be_put_in_place(hub: HubServer, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / hub.repos["org/tiny"].commit
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(b"")
    with pytest.raises(ModelError, match=r"cannot be stored in .*: (File exists|Not a directory)\. .*HF_HOME"):
        fetch()


def test_a_cache_that_cannot_be_written(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot be stored in .*: Not a directory\. .*HF_HOME"):
        fetch()
    assert hub.fetched() == set()


# -- silence and cancelling


def test_silence_is_said_and_the_download_goes_on(hub: HubServer) -> None:
    go_on = hub.hold(WEIGHTS, 1000)
    stalls = []
    for step in download(model_of("org/tiny"), stall_seconds=0.2):
        # On a busy machine the listing may take as long.
        if isinstance(step, DownloadStalled) and step.where == f"org/tiny/{WEIGHTS}":
            stalls.append(step)
            if len(stalls) == 2:
                go_on.set()
    assert len(stalls) >= 2
    assert 0.2 <= stalls[0].seconds < stalls[1].seconds


def test_a_silent_connection_is_made_anew(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.3)
    hub.hold(WEIGHTS, 1000)
    running = download(model_of("org/tiny"), stall_seconds=60)
    while len(hub.gets(WEIGHTS)) < 2:
        next(running)
    hub.mend()
    for _ in running:
        pass
    assert hub.gets(WEIGHTS)[1].range == "bytes=1000-"


def test_a_listing_that_does_not_come(hub: HubServer) -> None:
    hub.hold(LISTING, 0)
    cancel = Cancellation()
    running = download(model_of("org/tiny"), stall_seconds=0.1, cancel=cancel)
    step = next(running)
    assert isinstance(step, DownloadStalled)
    assert "listing" in step.where
    cancel.set()
    with pytest.raises(StopIteration) as end:
        next(running)
    assert end.value.value is None


def test_cancelling_while_the_index_is_fetched(hub: HubServer) -> None:
    hub.hold(INDEX_NAME, 0)
    cancel = Cancellation()
    running = download(model_of("org/sharded"), stall_seconds=0.1, cancel=cancel)
    step = next(running)
    assert isinstance(step, DownloadStalled)
    assert step.where == f"org/sharded/{INDEX_NAME}"
    cancel.set()
    assert list(running) == []
    assert hub.fetched() == {INDEX_NAME}


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("how", ["event", "close"])
def test_cancelling(hub: HubServer, tmp_path: Path, how: str, silent: bool) -> None:
    if silent:
        hub.hold(WEIGHTS, 1000)
    else:
        hub.rate = 50_000
    cancel = Cancellation()
    running = download(model_of("org/tiny"), stall_seconds=60, cancel=cancel)
    next(running)
    while not any(path.stat().st_size for path in partials(tmp_path)) or not hub.gets(WEIGHTS):
        time.sleep(0.01) if silent and hub.gets(WEIGHTS) else next(running)
    threading.Timer(0.05, cancel.set).start() if how == "event" else running.close()
    began = time.monotonic()
    assert list(running) == []
    assert time.monotonic() - began < 0.05 + 0.25 + 0.2  # the timer, the promise, a busy machine
    deadline = time.monotonic() + 5
    while downloaders() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert downloaders() == []
    (kept,) = partials(tmp_path)
    size = kept.stat().st_size
    hub.mend()
    _, steps = fetch()
    assert isinstance(steps[0], DownloadProgress)
    assert hub.gets(WEIGHTS)[-1].range == f"bytes={size}-"


def test_a_download_that_waits_is_woken_by_cancelling_alone(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.hold(WEIGHTS, 1000)
    cancel, waits = Cancellation(), []
    wait = Transfer.wait

    def noted(transfer: Transfer, seconds: float) -> bool:
        if any(file.name.endswith(WEIGHTS) for file in transfer.files):
            waits.append(seconds)
            threading.Thread(target=cancel.set).start()
        return wait(transfer, seconds)

    monkeypatch.setattr(Transfer, "wait", noted)
    monkeypatch.setattr(download_module, "_EVENT_SECONDS", 3600.0)
    assert fetch(stall_seconds=3600, cancel=cancel)[0] is None
    assert len(waits) == 1
    assert waits[0] > 1000  # nothing would be looked at before


def test_a_listing_that_is_waited_for_is_left_when_cancelled(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.hold(LISTING, 0)
    cancel, waits = Cancellation(), []

    class Noted(SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            waits.append(timeout)
            threading.Thread(target=cancel.set).start()
            return super().get(block, timeout)

    monkeypatch.setattr(download_module.queue, "SimpleQueue", Noted)
    assert fetch(stall_seconds=3600, cancel=cancel)[0] is None
    assert len(waits) == 1
    assert waits[0] > 1000


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_open(hub: HubServer) -> None:
    fetch()
    before = open_files(), threading.active_count()
    hub.always_cut("tokenizer.json", 0)
    for digit in "def":
        repo = hub.repos["org/tiny"]
        repo.commit = digit * 40
        repo.files["tokenizer.json"] += b" "
        with pytest.raises(RbeeError):
            fetch()
    deadline = time.monotonic() + 5
    while threading.active_count() > before[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before[1]
    assert open_files() <= before[0] + 2  # the connection that huggingface_hub keeps


def test_two_downloads_at_once_fetch_once(hub: HubServer) -> None:
    hub.rate = 1_000_000
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(folder())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(hub.gets(WEIGHTS)) == 1
