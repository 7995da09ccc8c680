"""ApiKeys: the accepted bearer tokens and their names."""

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rbee_worker.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ApiKeys:
    """The keys given at start and those of a file. The file can be read again while requests run.

    A key has a name that may be logged: the one in the file, else ``key-`` and the first 8 hex digits of its SHA-256.
    Only digests of keys are kept.

    Args:
        given: keys of the command line and the environment.
        file: a file with one key a line, or a name and a key. Empty lines and lines that begin with ``#`` are ignored.

    Attributes:
        file: as given.

    Raises:
        InvalidRequest: a key is empty or given twice; or the file cannot be read, has a bad line or has no key.
    """

    def __init__(self, given: Sequence[str] = (), file: Path | None = None) -> None:
        if not all(key.strip() for key in given):
            raise InvalidRequest("--api-key: a key is empty.", hint="Without a key, leave the option out.")
        self.file = file
        self._given = [(_default_name(key), _digest(key)) for key in dict.fromkeys(key.strip() for key in given)]
        self._known = self._read()

    def __bool__(self) -> bool:
        return bool(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def reload(self) -> None:
        """Read the file again. If that fails, the keys stay as they were.

        Raises:
            InvalidRequest: as at start.
        """
        self._known = self._read()

    def client(self, key: bytes) -> str | None:
        """The name of a key; None: the key is not accepted. Every key is compared, each in constant time."""
        digest = hashlib.sha256(key).digest()
        found = None
        for name, known in self._known:
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _read(self) -> list[tuple[str, bytes]]:
        if self.file is None:
            return self._given
        known = [*self._given, *_read_file(self.file)]
        digests = {digest for _, digest in known}
        if len(digests) < len(known):
            raise InvalidRequest(f"--api-key-file {self.file}: a key is given twice.", hint="Give each key once.")
        return known


def _read_file(path: Path) -> Iterable[tuple[str, bytes]]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise InvalidRequest(f"--api-key-file {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"--api-key-file {path}: not UTF-8: bad byte at position {error.start}.") from None
    found: list[tuple[str, bytes]] = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        *names, key = words
        if len(names) > 1 or any(not _NAME.fullmatch(name) for name in names):
            raise InvalidRequest(
                f"--api-key-file {path}: line {number} is neither a key nor a name and a key.",
                hint="A name is 1 to 64 letters, digits, dots, dashes and underscores.",
            )
        found.append((names[0] if names else _default_name(key), _digest(key)))
    if not found:
        raise InvalidRequest(f"--api-key-file {path}: the file holds no key.", hint="Write one key a line.")
    return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _default_name(key: str) -> str:
    return f"key-{_digest(key).hex()[:8]}"
