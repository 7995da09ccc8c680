"""Models of the Hugging Face hub: what is needed of a repository, fetched into the hub's own cache.

huggingface_hub gives the listing of a repository, the cache and its layout, the token, the endpoint and the offline
mode. The bytes are fetched by :mod:`rbee_worker.runtime.hub.transfer`: huggingface_hub removes what arrived when a
download ends early, and a download that was cut or cancelled must go on where it was. A file is put into the cache as
the blob that the hub's client looks for first, so that all its other users find it there. Cache layout:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from rbee_worker.cancellation import Cancellation
from rbee_worker.events import Downloading, Stalled
from rbee_worker.runtime.formats.safetensors import INDEX_NAME
from rbee_worker.runtime.hub.client import COMMIT, HubClient, HubModel, Listing, is_weights, refusal, unreachable
from rbee_worker.runtime.hub.transfer import Refused, Transfer, disk_full, free_bytes

T = TypeVar("T")

_EVENT_SECONDS: Final = 0.25
_RATE_SECONDS: Final = 5.0
_MB: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """Where a download stands.

    Attributes:
        bytes_downloaded: bytes on disk, those of earlier downloads included; never goes down.
        bytes_total: bytes of all the files that are needed.
        megabytes_per_second: 10^6 bytes a second, over the last seconds.
    """

    bytes_downloaded: int
    bytes_total: int
    megabytes_per_second: float

    def event(self, *, seq: int, elapsed_seconds: float) -> Downloading:
        """What is told of it."""
        return Downloading(
            seq=seq,
            elapsed_seconds=elapsed_seconds,
            bytes_downloaded=self.bytes_downloaded,
            bytes_total=self.bytes_total,
            speed_mbps=self.megabytes_per_second,
        )


@dataclass(frozen=True, slots=True)
class DownloadStalled:
    """No byte arrived for ``seconds``; ``where`` names what is waited for."""

    seconds: float
    where: str

    def event(self, *, seq: int, elapsed_seconds: float) -> Stalled:
        """What is told of it."""
        return Stalled(seq=seq, elapsed_seconds=elapsed_seconds, seconds=self.seconds, where=self.where)


Step = DownloadProgress | DownloadStalled


def download(
    model: HubModel, *, stall_seconds: float, cancel: Cancellation | None = None
) -> Generator[Step, None, Path | None]:
    """Bring a model into the hub's cache, or find it there.

    Nothing is yielded when nothing has to be fetched. Closing the generator, or setting ``cancel``, ends the download
    at once: threads that do not end within a fraction of a second are left behind. What arrived is kept for the next
    one.

    Args:
        model: the repository.
        stall_seconds: silence after which it is said, again and again; the download goes on.
        cancel: may be set from any thread.

    Returns:
        The folder of the files, or the one file of a repository that has its weights as GGUF; None when cancelled.

    Raises:
        ModelNotFound: the extra is not installed, the hub cannot be reached, or does not give this model.
        ModelMalformed: what arrived is not what the hub lists, or the repository is incomplete.
        ModelUnsupported: its weights are of a kind that is not read.
        DiskFull: the files do not fit where the cache is.
    """
    client = HubClient(model)
    cancel = cancel or Cancellation()
    if client.offline or COMMIT.fullmatch(model.revision or ""):
        cached = client.cached()
        if cached is not None:
            return cached
    if client.offline:
        raise unreachable(model, "HF_HUB_OFFLINE is set")
    listing = yield from _await(client.listing, stall_seconds, cancel)
    if isinstance(listing, Path) or listing is None:
        return listing
    try:
        finished = yield from _fetch(client, listing, stall_seconds, cancel)
    except Refused as error:
        raise refusal(model, error) from error
    if not finished:
        return None
    client.remember(listing)
    return listing.place()


def _fetch(
    client: HubClient, listing: Listing, stall_seconds: float, cancel: Cancellation
) -> Generator[Step, None, bool]:
    """Fetch what is not in the cache; False when cancelled."""
    if INDEX_NAME in listing.files and listing.path(INDEX_NAME) is None:
        # It decides which files there are to fetch.
        index = client.transfer(listing, [INDEX_NAME])
        if not (yield from _follow(index, None, stall_seconds, cancel)):
            return False
    names = listing.choose()
    needed = sum(listing.files[name].size - listing.bytes_on_disk(name) for name in names)
    if needed > free_bytes(client.cache):
        raise disk_full(needed, client.cache, str(listing.model))
    meter = _Meter(listing, names)
    weights = [name for name in names if is_weights(name)]
    # The weights last, so that a snapshot that has them is complete.
    for part in ([name for name in names if name not in weights], weights):
        missing = [name for name in part if listing.path(name) is None]
        if missing and not (yield from _follow(client.transfer(listing, missing), meter, stall_seconds, cancel)):
            return False
    return True


def _follow(
    transfer: Transfer, meter: "_Meter | None", stall_seconds: float, cancel: Cancellation
) -> Generator[Step, None, bool]:
    """Run a transfer, saying where it stands (without a meter: only that it stalls); False when cancelled."""
    silence = _Silence(stall_seconds)
    forget = cancel.on_set(transfer.interrupt)
    try:
        if meter is not None:
            yield meter.begin(transfer)
        transfer.start()
        look_at = time.monotonic() + _EVENT_SECONDS if meter is not None else math.inf
        while not transfer.wait(min(look_at, silence.due(transfer.last_byte_at)) - time.monotonic()):
            if cancel.is_set():
                return False
            now = time.monotonic()
            if meter is not None and now >= look_at:
                look_at = now + _EVENT_SECONDS
                if meter.moved:
                    yield meter.read()
            if silence.is_due(transfer.last_byte_at):
                yield DownloadStalled(round(now - transfer.last_byte_at, 1), transfer.reading)
        if meter is not None:
            yield meter.read()
        return True
    finally:
        forget()
        transfer.close()


class _Meter:
    """Counts and rate of a download."""

    def __init__(self, listing: Listing, names: list[str]) -> None:
        self._listing = listing
        self._names = names
        self._total = sum(listing.files[name].size for name in names)
        self._shown = 0
        self._samples: deque[tuple[float, int]] = deque()

    def begin(self, transfer: Transfer) -> DownloadProgress:
        """Count what ``transfer`` brings from here on."""
        fetched = {file.name for file in transfer.files}
        self._transfer = transfer
        self._others = sum(
            self._listing.bytes_on_disk(name) for name in self._names if self._listing.files[name].name not in fetched
        )
        return self.read()

    @property
    def moved(self) -> bool:
        """Whether bytes arrived since the last reading."""
        return self._others + self._transfer.bytes_done > self._shown

    def read(self) -> DownloadProgress:
        """Where the download stands."""
        now, done = time.monotonic(), self._others + self._transfer.bytes_done
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > _RATE_SECONDS:  # noqa: PLR2004 (both ends)
            self._samples.popleft()
        since, before = self._samples[0]
        rate = max(done - before, 0) / (now - since) if now > since else 0.0
        # A server that cannot resume makes a file begin anew; what was shown stays.
        self._shown = max(self._shown, done)
        return DownloadProgress(self._shown, self._total, round(rate / _MB, 3))


class _Silence:
    """When to say that nothing arrives: after ``seconds``, and again each time they pass."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._said_at = time.monotonic()

    def due(self, last_byte_at: float) -> float:
        """When to say it next, by ``time.monotonic``, if no byte arrives."""
        return max(last_byte_at, self._said_at) + self._seconds

    def is_due(self, last_byte_at: float) -> bool:
        """Whether to say it now."""
        now = time.monotonic()
        due = now >= self.due(last_byte_at)
        if due:
            self._said_at = now
        return due


def _await(
    action: Callable[[], T], stall_seconds: float, cancel: Cancellation
) -> Generator[DownloadStalled, None, T | None]:
    """The result of ``action``, run on a thread so that it can be left alone; None when cancelled."""
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    forget = cancel.on_set(lambda: results.put((None, None)))

    def run() -> None:
        try:
            results.put((action(), None))
        except BaseException as error:  # noqa: BLE001  (whoever waits gets it)
            results.put((None, error))

    began = time.monotonic()
    silence = _Silence(stall_seconds)
    try:
        threading.Thread(target=run, name="hub-listing", daemon=True).start()
        while True:
            try:
                result, error = results.get(timeout=max(silence.due(began) - time.monotonic(), 0))
            except queue.Empty:
                if silence.is_due(began):
                    yield DownloadStalled(round(time.monotonic() - began, 1), "the hub's listing of the repository")
                continue
            if error is not None:
                raise error
            return result
    finally:
        forget()
