"""The file system that holds a model's files, and how to read from it. Does not import torch.

Files are read. With ``mmap`` those on local storage are mapped and brought in (``loading/mapping.py``). A mapped file
on a network would be fetched page by page, in the order in which pages are first used; so those are always read.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

LOCAL_READERS = 2
_LOCAL_CHUNK = 8 * 2**20
_NETWORK_CHUNK = 32 * 2**20

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p", "afs", "afpfs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs",
        "nfs4", "ocfs2", "orangefs", "panfs", "smb3", "smbfs", "virtiofs", "vboxsf", "webdav", "wekafs",
    }
)  # fmt: skip
"""File systems whose bytes come over a network or from another machine. FUSE (``fuse.*``) counts too."""

_LOCAL_FUSE = frozenset({"fuse.bindfs", "fuse.ntfs-3g", "fuse.exfat", "fuse.lxcfs", "fuse.gocryptfs"})


@dataclass(frozen=True, slots=True)
class Storage:
    """The type of a file system, as the operating system names it, and whether it is on a network."""

    file_system: str
    network: bool

    @property
    def readers(self) -> int:
        """How many threads read at once. On a network it is one, because servers read ahead for sequential readers."""
        return 1 if self.network else LOCAL_READERS

    @property
    def chunk_bytes(self) -> int:
        """Bytes that are read at once. Between two reads, the reader checks whether to stop."""
        return _NETWORK_CHUNK if self.network else _LOCAL_CHUNK

    def __str__(self) -> str:
        return f"{self.file_system}, network: read sequentially" if self.network else f"{self.file_system}, local"


def storage_of(path: Path) -> Storage:
    """The file system that holds ``path``. Links are followed: files in the hub's cache are links."""
    real = path.resolve()
    if sys.platform == "linux":
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            mounts = ""
        return storage_in(real, mounts_of(mounts))
    return storage_in(real, [(Path(part.mountpoint), part.fstype) for part in psutil.disk_partitions(all=True)])


def mounts_of(mountinfo: str) -> list[tuple[Path, str]]:
    """Mount points and file system types in the text of ``/proc/self/mountinfo``, in the same order.

    A line is ``id parent major:minor root mountpoint options [tags] - type source super-options``. Spaces and
    backslashes in a mount point are written as octal escapes. Format: proc_pid_mountinfo(5).
    """
    mounts = []
    for line in mountinfo.splitlines():
        head, _, tail = line.partition(" - ")
        fields = head.split()
        if len(fields) > 4 and tail:  # noqa: PLR2004 - the mount point is the fifth
            point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            mounts.append((Path(point), tail.split()[0]))
    return mounts


def storage_in(path: Path, mounts: list[tuple[Path, str]]) -> Storage:
    """The file system of the mount that holds ``path``: of those with the longest mount point, the last."""
    best: tuple[int, str] = (-1, "unknown")
    for point, kind in mounts:
        if path.is_relative_to(point) and len(point.parts) >= best[0]:
            best = (len(point.parts), kind)
    kind = best[1]
    fuse = kind.startswith("fuse.") and kind not in _LOCAL_FUSE
    return Storage(kind, kind in NETWORK_FILE_SYSTEMS or fuse)


def advise(descriptor: int, offset: int, nbytes: int) -> None:
    """Tell the operating system, where it has a call for that, that these bytes will be read soon and in order."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_SEQUENTIAL)
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
