from pathlib import Path

import pytest

from rbee_worker.runtime.machine.storage import Storage, mounts_of, storage_in, storage_of

MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
31 22 0:40 / /mnt/models rw,relatime shared:7 - nfs4 server:/export/models rw,vers=4.2,rsize=1048576
32 31 0:41 / /mnt/models/local rw - xfs /dev/nvme0n1 rw
33 22 0:42 / /mnt/my\\040disk rw,noatime master:3 propagate_from:2 - cifs //server/share rw
34 22 0:43 / /home/me/bucket rw - fuse.s3fs s3fs rw
35 22 0:44 / /home/me/crypt rw - fuse.gocryptfs /home/me/cipher rw
36 22 0:45 / /over rw - ext4 /dev/vdb rw
37 22 0:46 / /over rw - lustre mgs@tcp:/work rw
38 22 0:47 / /shared rw - virtiofs shared rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/data/model.safetensors", "ext4", False),
        ("/mnt/models/llama/model.safetensors", "nfs4", True),
        ("/mnt/models-2/model.safetensors", "ext4", False),
        ("/mnt/models/local/model.safetensors", "xfs", False),
        ("/mnt/my disk/model.gguf", "cifs", True),
        ("/home/me/bucket/model.gguf", "fuse.s3fs", True),
        ("/home/me/crypt/model.gguf", "fuse.gocryptfs", False),
        ("/over/model.gguf", "lustre", True),
        ("/shared/model.gguf", "virtiofs", True),
    ],
)
def test_the_innermost_mount_decides(path: str, kind: str, network: bool) -> None:
    assert storage_in(Path(path), mounts_of(MOUNTINFO)) == Storage(kind, network)


def test_lines_that_are_no_mounts_are_passed_over() -> None:
    assert mounts_of("nonsense\n\n1 2 3 - ext4\n22 1 254:0 / / rw -\n") == []
    assert storage_in(Path("/x"), []) == Storage("unknown", network=False)


def test_a_network_is_read_by_one_reader_in_larger_chunks() -> None:
    disk, network = Storage("ext4", network=False), Storage("nfs4", network=True)
    assert network.readers == 1 < disk.readers
    assert network.chunk_bytes > disk.chunk_bytes
    assert (str(disk), str(network)) == ("ext4, local", "nfs4, network: read sequentially")


def test_a_link_is_followed_to_where_the_bytes_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "blobs" / "x"
    target.parent.mkdir()
    target.write_bytes(b"")
    link = tmp_path / "model.safetensors"
    link.symlink_to(target)
    mounts = [(Path("/"), "ext4"), (tmp_path / "blobs", "nfs")]
    monkeypatch.setattr("rbee_worker.runtime.machine.storage.mounts_of", lambda _: mounts)
    monkeypatch.setattr("sys.platform", "linux")
    assert storage_of(link) == Storage("nfs", network=True)


def test_other_systems_are_asked_through_psutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert storage_of(tmp_path).file_system != "unknown"
