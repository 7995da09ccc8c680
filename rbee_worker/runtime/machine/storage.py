"""Where a model's files lie, and how such a place is best read. No torch.

Files are always read, never mapped: a layer that is only mapped is not loaded, and a file on a network that is mapped
is fetched page by page, in the order in which the pages happen to be touched.
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
"""File systems whose bytes come over a network or from another machine. Those of FUSE (``fuse.*``) count too."""

_LOCAL_FUSE = frozenset({"fuse.bindfs", "fuse.ntfs-3g", "fuse.exfat", "fuse.lxcfs", "fuse.gocryptfs"})


@dataclass(frozen=True, slots=True)
class Storage:
    """A file system as the loader sees it: its type, as the system names it, and whether it is on a network."""

    file_system: str
    network: bool

    @property
    def readers(self) -> int:
        """Threads that read at once. One behind a network: its server reads ahead of a sequential reader."""
        return 1 if self.network else LOCAL_READERS

    @property
    def chunk_bytes(self) -> int:
        """Bytes asked for at once, and between two looks at whether to stop."""
        return _NETWORK_CHUNK if self.network else _LOCAL_CHUNK

    def __str__(self) -> str:
        return f"{self.file_system}, network: read sequentially" if self.network else f"{self.file_system}, local"


def storage_of(path: Path) -> Storage:
    """The file system that holds ``path``, links followed: a hub's cache links to files that may lie elsewhere."""
    real = path.resolve()
    if sys.platform == "linux":
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            mounts = ""
        return storage_in(real, mounts_of(mounts))
    return storage_in(real, [(Path(part.mountpoint), part.fstype) for part in psutil.disk_partitions(all=True)])


def mounts_of(mountinfo: str) -> list[tuple[Path, str]]:
    """Mount points and file system types in the text of ``/proc/self/mountinfo``, in its order.

    A line is ``id parent major:minor root mountpoint options [tags] - type source super-options``; blanks and
    backslashes in a mount point are octal escapes. Format: proc_pid_mountinfo(5).
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
    """The mount that holds ``path``: of those with the longest mount point, the last, which covers the others."""
    best: tuple[int, str] = (-1, "unknown")
    for point, kind in mounts:
        if path.is_relative_to(point) and len(point.parts) >= best[0]:
            best = (len(point.parts), kind)
    kind = best[1]
    fuse = kind.startswith("fuse.") and kind not in _LOCAL_FUSE
    return Storage(kind, kind in NETWORK_FILE_SYSTEMS or fuse)


def advise(descriptor: int, offset: int, nbytes: int) -> None:
    """Tell the operating system that these bytes will be read soon, from first to last, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_SEQUENTIAL)
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
