"""A hub on this machine: the part of the Hugging Face hub's protocol that downloads use, with faults to order.

``GET /api/models/{repo}[/revision/{revision}]`` lists a commit; ``HEAD`` and ``GET /{repo}/resolve/{revision}/{file}``
give a file, with ranges. Files whose names end like weights are LFS files, with a SHA-256; the others have Git's SHA-1.
"""

import hashlib
import json
import re
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from safetensors.torch import load_file, save_file

from tests.tiny import write_tiny_model

LISTING = "listing"
"""The name under which faults of the listing are ordered."""

_LFS = (".safetensors", ".gguf", ".bin", ".onnx")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_PIECES_PER_SECOND = 50


@dataclass
class Repo:
    """A repository with one commit, and the revisions that stand for it."""

    files: dict[str, bytes]
    commit: str = "c" * 40
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    name: str
    range: str | None
    token: str | None


@dataclass
class _Faults:
    """What is to go wrong for one file; ``deque`` entries are used up one a GET."""

    cuts: deque[int] = field(default_factory=deque)
    always_cut: int | None = None
    statuses: deque[tuple[int, dict[str, str]]] = field(default_factory=deque)
    head_cuts: int = 0
    head_refusal: tuple[int, dict[str, str]] | None = None
    hold: tuple[int, threading.Event] | None = None
    instead: bytes | None = None


class HubServer:
    """Runs while entered.

    Attributes:
        repos: by ``org/name``; files may be replaced at any time.
        asked: every request, in order.
        rate: bytes a second that each connection gets; None: as fast as it goes.
        ranges: whether ranges are honoured.
        bare: the listing gives names alone, as some mirrors do.
        etags: ``hub``: digests, as the hub's own; ``other``: of a mirror's own making; ``none``.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[Asked] = []
        self.rate: float | None = None
        self.ranges = True
        self.bare = False
        self.etags = "hub"
        self._faults: dict[str, _Faults] = {}
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        # Polled often, since every test waits for it to end.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        for faults in self._faults.values():
            if faults.hold is not None:
                faults.hold[1].set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # -- orders

    def faults(self, name: str) -> _Faults:
        return self._faults.setdefault(name, _Faults())

    def cut(self, name: str, *after: int) -> None:
        """Close the connection after so many bytes of the body, once for each figure."""
        self.faults(name).cuts.extend(after)

    def always_cut(self, name: str, after: int) -> None:
        self.faults(name).always_cut = after

    def cut_heads(self, name: str, times: int = 1) -> None:
        """Answer HEAD requests by closing the connection."""
        self.faults(name).head_cuts = times

    def refuse_heads(self, name: str, status: int, **headers: str) -> None:
        """Answer HEAD requests with a status, each time."""
        self.faults(name).head_refusal = status, {key.replace("_", "-"): value for key, value in headers.items()}

    def refuse(self, name: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer GET requests with a status."""
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.faults(name).statuses.extend([(status, named)] * times)

    def hold(self, name: str, after: int) -> threading.Event:
        """Send so many bytes of the body, then nothing until the event is set."""
        event = threading.Event()
        self.faults(name).hold = (after, event)
        return event

    def send(self, name: str, data: bytes) -> None:
        """Send other bytes than the listing says."""
        self.faults(name).instead = data

    def mend(self) -> None:
        """Nothing goes wrong any more."""
        self._faults.clear()
        self.rate = None

    # -- questions

    def gets(self, name: str) -> list[Asked]:
        """The GET requests for a file, or for the listing."""
        return [asked for asked in self.asked if asked.method == "GET" and asked.name == name]

    def fetched(self) -> set[str]:
        """Names of the files that were asked for."""
        return {asked.name for asked in self.asked if asked.method == "GET"} - {LISTING}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Keep the tests' output clean."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        if match is None:
            self._refuse(404, {})
            return
        name = match.groupdict().get("name") or LISTING
        self.hub.asked.append(Asked(self.command, name, self.headers.get("Range"), self.headers.get("Authorization")))
        repo = self.hub.repos.get(match["repo"])
        faults = self.hub._faults.get(name, _Faults())
        if repo is None:
            self._refuse(401, {"X-Error-Code": "RepoNotFound"})
        elif (match["revision"] or "main") not in (*repo.revisions, repo.commit):
            self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        elif name == LISTING:
            self._give(json.dumps(_listing(match["repo"], repo, bare=self.hub.bare)).encode(), {}, faults)
        elif repo.gated:
            self._refuse(403, {"X-Error-Code": "GatedRepo"})
        elif name not in repo.files:
            self._refuse(404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._file(name, repo, faults)

    def _file(self, name: str, repo: Repo, faults: _Faults) -> None:
        data = repo.files[name]
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if _is_lfs(name):
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data)), "ETag": '"cdn"'}
        else:
            headers |= {"ETag": f'"{git_sha1(data)}"'}
        if self.hub.etags != "hub":
            headers = {key: value for key, value in headers.items() if not key.startswith(("ETag", "X-Linked"))}
        if self.hub.etags == "other":
            headers["ETag"] = f'"v1_{sha256(data)[:8]}"'
        if faults.instead is not None:
            data = faults.instead
        self._give(data, headers, faults)

    def _give(self, data: bytes, headers: dict[str, str], faults: _Faults) -> None:
        if self.command == "HEAD" and faults.head_cuts:
            faults.head_cuts -= 1
            self._hang_up()
            return
        if self.command == "HEAD" and faults.head_refusal is not None:
            self._refuse(*faults.head_refusal)
            return
        if self.command == "GET" and faults.statuses:
            self._refuse(*faults.statuses.popleft())
            return
        start, status = 0, 200
        if (asked := self.headers.get("Range")) and self.hub.ranges:
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data) - start)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self._send(data[start:], faults)

    def _send(self, body: bytes, faults: _Faults) -> None:
        cut = faults.cuts.popleft() if faults.cuts else faults.always_cut
        whole = body if cut is None else body[:cut]
        try:
            if faults.hold is not None:
                after, event = faults.hold
                self._pour(whole[:after])
                event.wait()
                whole = whole[after:]
            self._pour(whole)
        except OSError:  # the client has gone
            self.close_connection = True
            return
        if cut is not None:
            self._hang_up()

    def _pour(self, data: bytes) -> None:
        if self.hub.rate is None:
            self.wfile.write(data)
            return
        step = max(int(self.hub.rate / _PIECES_PER_SECOND), 1)
        for start in range(0, len(data), step):
            if self.hub.rate is None or self.hub._closing.is_set():
                self.wfile.write(data[start:])
                return
            self.wfile.write(data[start : start + step])
            time.sleep(1 / _PIECES_PER_SECOND)

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(key, value)
        self.end_headers()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def sha256(data: bytes) -> str:
    """The digest of an LFS file."""
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def tiny_repo(folder: Path) -> Repo:
    """The tiny model, among files that nobody needs."""
    write_tiny_model(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "original/model.bin"):
        files[name] = b"not needed"
    files["generation_config.json"] = b"{}"
    return Repo(files)


def sharded_repo(folder: Path) -> Repo:
    """The tiny model in two shards with an index, beside a shard that the index does not name."""
    repo = tiny_repo(folder)
    tensors = load_file(folder / "model.safetensors")
    del repo.files["model.safetensors"]
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        repo.files[shard] = (folder / shard).read_bytes()
        weight_map |= dict.fromkeys(part, shard)
    repo.files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    repo.files["model-00003-of-00003.safetensors"] = b"not needed"
    return repo


def _is_lfs(name: str) -> bool:
    return name.endswith(_LFS)


def _listing(name: str, repo: Repo, *, bare: bool) -> dict[str, Any]:
    siblings = []
    for file, data in repo.files.items():
        entry: dict[str, Any] = {"rfilename": file}
        if not bare:
            entry |= {"size": len(data), "blobId": git_sha1(data)}
            if _is_lfs(file):
                entry["lfs"] = {"size": len(data), "sha256": sha256(data), "pointerSize": 130}
        siblings.append(entry)
    return {"id": name, "sha": repo.commit, "siblings": siblings}
