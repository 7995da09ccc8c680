"""The reading of a model: a few threads, each reading a group of tensors and building its part, side by side.

While one thread packs, another reads; the operating system reads ahead of both. Parts are handed out in order, and
no thread works further ahead than a few parts. Nothing here waits for a read without a limit: the threads are
daemons, and one that is stuck in a read (a network disk that is gone) is left behind when the load is closed.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from rbee_worker.errors import ModelMalformed
from rbee_worker.escape import quoted
from rbee_worker.kernels.formats import FORMATS
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.files import open_unbuffered
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.finite import all_finite, check_finite
from rbee_worker.runtime.formats.gguf.model import dequantize, undo_rope_permutation
from rbee_worker.runtime.formats.quantized.dequantize import read_dequantized
from rbee_worker.runtime.formats.quantized.tensor import QuantizedTensor, files_of
from rbee_worker.runtime.loading.copier import Copier, PinnedCopier
from rbee_worker.runtime.loading.groups import PLAIN_DTYPES, WeightGroup
from rbee_worker.runtime.loading.mapping import MappedFile
from rbee_worker.runtime.loading.parts import PartBuilder, rows_of
from rbee_worker.runtime.machine.devices import trim_host_memory
from rbee_worker.runtime.machine.storage import Storage, advise
from rbee_worker.runtime.model.decoder import Part
from rbee_worker.runtime.model.linear.linear import LinearFormat

_AHEAD = 2
"""Parts that may be finished before the one that is waited for, beside those in work."""

_CLOSE_SECONDS = 0.15
_DECODE_WEIGHTS = 2**20
"""Quantized GGUF weights decoded at once: decoding takes several float32 copies of them."""


class RawFile(Protocol):
    """What is asked of an open file."""

    def fileno(self) -> int: ...
    def seek(self, offset: int, /) -> int: ...
    def readinto(self, buffer: memoryview, /) -> int | None: ...
    def close(self) -> None: ...


def open_raw(path: Path) -> RawFile:
    """Open a file without Python's buffer."""
    return open_unbuffered(path)


class Stopped(Exception):
    """The reading was closed."""


class ReadState:
    """What the threads share: how far they are, and whether to go on. Written under a lock, read without one."""

    def __init__(self, groups: Sequence[WeightGroup]) -> None:
        infos = [info for group in groups for info in group.tensors.values()]
        self.bytes_total = sum(info.nbytes for info in infos)
        self.bytes_read = 0
        self.bytes_mapped = 0
        self.mapped_files: tuple[MappedFile, ...] = ()
        self.started_at = self.last_byte_at = time.monotonic()
        self.reading = ""
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._in_system: set[int] = set()
        self._identities = {path: _identity(path.stat()) for info in infos for path in files_of(info)}

    @contextmanager
    def system_call(self, path: Path) -> Iterator[None]:
        """Around a call that may not return: opening a file, reading from it.

        Raises:
            Stopped: the reading was closed.
            ModelMalformed: the system reports an error.
        """
        thread = threading.get_ident()
        with self._lock:
            if self.stop.is_set():
                raise Stopped
            self._in_system.add(thread)
        self.reading = path.name
        try:
            yield
        except OSError as error:
            raise ModelMalformed(f"{path}: cannot be read: {error.strerror or error}.") from error
        finally:
            self._in_system.discard(thread)

    def end(self) -> None:
        """Let no thread begin another such call."""
        with self._lock:
            self.stop.set()

    def in_system(self, thread: threading.Thread) -> bool:
        """Whether a thread is in such a call."""
        return thread.ident in self._in_system

    @property
    def reads(self) -> bool:
        """Whether bytes are still to come."""
        return self.bytes_read < self.bytes_total

    def count(self, nbytes: int) -> None:
        """Bytes have arrived."""
        with self._lock:
            self.bytes_read += nbytes
            self.last_byte_at = time.monotonic()

    def map_file(self, path: Path, descriptor: int) -> MappedFile:
        """Map a file, and remember it.

        Raises:
            OSError: it cannot be mapped.
        """
        mapped = MappedFile(path, descriptor)
        with self._lock:
            self.mapped_files += (mapped,)
        return mapped

    def count_mapped(self, nbytes: int) -> None:
        """So many bytes are used where their file is mapped."""
        with self._lock:
            self.bytes_mapped += nbytes

    def check_unchanged(self, path: Path, descriptor: int) -> None:
        """Raise ModelMalformed when a file is not, or no longer, the one that was there when the load began."""
        if _identity(os.fstat(descriptor)) != self._identities[path]:
            raise _changed(path)


class TensorReader:
    """Reads tensors into memory on any device, in any floating dtype. Belongs to one thread."""

    def __init__(
        self, state: ReadState, device: torch.device, chunk_bytes: int, open_file: Callable[[Path], RawFile]
    ) -> None:
        self._state, self._chunk, self._open_file = state, chunk_bytes, open_file
        self._copier = PinnedCopier(device, chunk_bytes) if device.type == "cuda" else Copier()
        self._files: dict[Path, RawFile] = {}
        self._mapped: dict[Path, MappedFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def read(self, info: TensorInfo, target: Tensor, held: torch.dtype) -> None:
        """Fill ``target``, contiguous and of ``info.shape``, with a stored tensor's values.

        Args:
            info: the stored tensor.
            target: what is filled; of quantized blocks that stay as they are, uint8 [rows, bytes of a row].
            held: the dtype that the values will be kept in, once they are packed; uint8: in their blocks.

        Raises:
            ModelMalformed: the file ends early, cannot be read, or has changed; a value is not finite.
            ModelUnsupported: a value is too large for ``held``.
            Stopped: the reading was closed.
        """
        if isinstance(info, QuantizedTensor):
            read_dequantized(info, target, held, self._read_part)
            for path in files_of(info):
                self._state.check_unchanged(path, self._files[path].fileno())
            return
        file = self._file(info)
        if held == torch.uint8 and info.dtype != "U8":
            self._read_blocks(file, info, target)
            self._state.check_unchanged(info.file, file.fileno())
            return
        stored = torch.uint8 if info.dtype == "U8" else PLAIN_DTYPES.get(info.dtype)
        if stored is None or info.rope_heads or info.shift:
            self._read_quantized(file, info, target, held)
        else:
            # A GPU looks at what has arrived there faster than the host does; only the host can name what is wrong.
            on_gpu = target.device.type == "cuda"
            self._read_plain(file, info, target, stored, None if on_gpu else held)
            if on_gpu and target.is_floating_point() and not all_finite(target):
                self._read_plain(file, info, target, stored, held)
        self._state.check_unchanged(info.file, file.fileno())

    def map_in(self, info: TensorInfo, held: torch.dtype) -> Tensor:
        """A stored tensor's bytes where its file is mapped, uint8 [nbytes]; they are in memory.

        Args:
            info: the stored tensor; its bytes are what is multiplied.
            held: the dtype of its values; uint8: they are in blocks.

        Raises:
            ModelMalformed: the file ends early, cannot be read, or has changed; a value or a scale is not finite.
            Stopped: the reading was closed.
        """
        state, file = self._state, self._file(info)
        state.check_unchanged(info.file, file.fileno())
        mapped = self._mapped.get(info.file)
        if mapped is None:
            with state.system_call(info.file):
                mapped = self._mapped[info.file] = state.map_file(info.file, file.fileno())
        for start in range(0, info.nbytes, self._chunk):
            count = min(self._chunk, info.nbytes - start)
            try:
                with state.system_call(info.file):
                    there = mapped.bring_in(info.offset + start, count)
            except ModelMalformed:
                state.check_unchanged(info.file, file.fileno())  # this says more of a file that was cut
                raise
            if there:
                state.count(count)
            else:  # what has been read is in the system's cache, and the check below touches each page
                part = replace(info, offset=info.offset + start, nbytes=count)
                self._read_bytes(file, part, torch.empty(count, dtype=torch.uint8))
        state.check_unchanged(info.file, file.fileno())
        raw = mapped.part(info.offset, info.nbytes)
        if held == torch.uint8:
            _check_blocks(info, raw)
        else:
            for piece in torch.split(raw, self._copier.nbytes):
                check_finite(info, piece.view(held), held)
        state.check_unchanged(info.file, file.fileno())
        state.count_mapped(info.nbytes)
        return raw

    def _read_plain(
        self, file: RawFile, info: TensorInfo, target: Tensor, stored: torch.dtype, held: torch.dtype | None
    ) -> None:
        """Read, check and convert piece by piece, so that each piece is in the cache for all three; None: no check."""
        flat, begin = target.view(-1), 0
        in_place = stored == target.dtype and target.device.type == "cpu"
        while begin < flat.numel():
            count = min(self._copier.nbytes // stored.itemsize, flat.numel() - begin)
            piece = flat[begin : begin + count]
            raw = piece.view(torch.uint8) if in_place else self._copier.buffer(count * stored.itemsize)
            self._read_bytes(file, info, raw, begin * stored.itemsize)
            if held is not None:
                check_finite(info, raw.view(stored), held)
            if not in_place:
                self._copier.copy(raw.view(stored), piece)
            begin += count
        self._copier.finish()

    def _read_part(self, part: TensorInfo, raw: Tensor, start: int, counted: bool) -> None:
        self._read_bytes(self._file(part), part, raw, start, counted=counted)

    def _read_quantized(self, file: RawFile, info: TensorInfo, target: Tensor, held: torch.dtype) -> None:
        rows, step = info.shape[0], info.shape[0]
        if len(info.shape) > 1:
            unit = rows // info.rope_heads if info.rope_heads else 1  # a head's rows are permuted among themselves
            step = max(1, _DECODE_WEIGHTS // (info.shape[1] * unit)) * unit
        for begin in range(0, rows, step):
            part = rows_of(info, begin, min(begin + step, rows))
            raw = torch.empty(part.nbytes, dtype=torch.uint8)
            self._read_bytes(file, part, raw)
            values = torch.from_numpy(dequantize(part, raw.numpy()))
            check_finite(info, values, held)
            target[begin : begin + step].copy_(values)

    def _read_blocks(self, file: RawFile, info: TensorInfo, target: Tensor) -> None:
        """Fill ``target``, uint8 [rows, bytes of a row], with blocks as they are; rows in their true order."""
        if info.rope_heads:
            raw = torch.empty(info.nbytes, dtype=torch.uint8)
            self._read_bytes(file, info, raw)
            target.copy_(torch.from_numpy(undo_rope_permutation(raw.numpy(), info.shape[0], info.rope_heads)))
        else:
            self._read_bytes(file, info, target.view(-1))
        _check_blocks(info, target)

    def _read_bytes(
        self, file: RawFile, info: TensorInfo, raw: Tensor, start: int = 0, *, counted: bool = True
    ) -> None:
        """Fill ``raw``, uint8 on the host, with the tensor's bytes from ``start``."""
        view, done, state = raw.numpy().data, 0, self._state
        with state.system_call(info.file):
            file.seek(info.offset + start)
        while done < len(view):
            with state.system_call(info.file):
                count = file.readinto(view[done : done + self._chunk])
            if not count:
                raise ModelMalformed(
                    f"{info.file.name}: ends inside tensor '{info.name}', {info.nbytes - start - done} bytes short.",
                    hint="Was the file changed while it was being read?",
                )
            done += count
            state.count(count if counted else 0)

    def _file(self, info: TensorInfo) -> RawFile:
        file = self._files.get(info.file)
        if file is None:
            with self._state.system_call(info.file):
                file = self._files[info.file] = self._open_file(info.file)
        with self._state.system_call(info.file):
            advise(file.fileno(), info.offset, info.nbytes)
        return file


class WeightReader:
    """Reads groups and builds parts on a few threads; hands the parts out in order.

    Attributes:
        state: how far the reading is.
    """

    def __init__(
        self,
        groups: Sequence[WeightGroup],
        config: ModelConfig,
        form: LinearFormat,
        device: torch.device,
        storage: Storage,
        *,
        mapped: bool = False,
        open_file: Callable[[Path], RawFile] | None = None,
    ) -> None:
        """Begin to read; ``mapped``: what runs as it is stored is used where its file is mapped.

        Raises:
            ModelMalformed: a file is gone.
        """
        try:
            self.state = ReadState(groups)
        except OSError as error:
            raise ModelMalformed(f"{error.filename}: cannot be read: {error.strerror}.") from error
        self._groups, self._config, self._form, self._device = groups, config, form, device
        self._chunk, self._open_file = storage.chunk_bytes, open_file or open_raw
        self._mapped = mapped
        self._window = storage.readers + _AHEAD
        self._changed = threading.Condition()
        self._taken = self._handed_out = 0
        self._interrupted = False
        self._done: dict[int, Part] = {}
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"weight-reader-{index}", daemon=True)
            for index in range(min(storage.readers, len(groups)))
        ]
        for thread in self._threads:
            thread.start()

    def next_part(self, timeout: float) -> Part | None:
        """The next part, or None when it is not there within ``timeout`` seconds, or :meth:`interrupt` was called.

        Raises:
            StopIteration: every part has been handed out.
            ModelMalformed: a file ended early, could not be read or was changed.
        """
        with self._changed:
            if self._handed_out == len(self._groups):
                raise StopIteration
            self._changed.wait_for(
                lambda: self._interrupted or self._failure is not None or self._handed_out in self._done, timeout
            )
            if self._failure is not None:
                raise self._failure
            part = self._done.pop(self._handed_out, None)
            if part is not None:
                self._handed_out += 1
                self._changed.notify_all()
            return part

    def interrupt(self) -> None:
        """Let :meth:`next_part` wait no more; any thread or signal handler may call this."""
        with self._changed:
            self._interrupted = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the threads at their next chunk and drop what they hold; one that hangs in a read is left behind."""
        with self._changed:
            self.state.end()
            self._done.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
            if not self.state.in_system(thread):
                thread.join()  # it computes, and reads no more

    def _run(self) -> None:
        try:
            self._work()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the parts are waited for
            # The frames hold tensors; whoever keeps the error must not keep those.
            traceback.clear_frames(error.__traceback__)
            with self._changed:
                self._failure = self._failure or error
                self.state.end()
                self._changed.notify_all()
        if self.state.stop.is_set():
            trim_host_memory()  # whoever closed the reader may not have waited for this thread

    def _work(self) -> None:
        with TensorReader(self.state, self._device, self._chunk, self._open_file) as tensors:
            map_in = tensors.map_in if self._mapped else None
            builder = PartBuilder(self._config, self._form, self._device, tensors.read, map_in)
            while (index := self._next_group()) is not None:
                last = index >= len(self._groups) - len(self._threads)
                self._deliver(index, builder.build(self._groups[index], last=last))
                if self._form.packed:
                    trim_host_memory()  # of what packing took and freed, malloc keeps a third of a layer every time

    def _next_group(self) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: self.state.stop.is_set() or self._taken < self._handed_out + self._window)
            if self.state.stop.is_set() or self._taken == len(self._groups):
                return None
            self._taken += 1
            return self._taken - 1

    def _deliver(self, index: int, part: Part) -> None:
        with self._changed:
            if not self.state.stop.is_set():
                self._done[index] = part
                self._changed.notify_all()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _changed(path: Path) -> ModelMalformed:
    return ModelMalformed(
        f"{path.name}: the file was changed while it was being read.",
        hint="Load it again once whatever writes it is done.",
    )


def _check_blocks(info: TensorInfo, blocks: Tensor) -> None:
    if not FORMATS[info.dtype].finite(blocks):
        raise ModelMalformed(
            f"{info.file.name}: tensor {quoted(info.name)} has scales that are not finite.",
            hint="Download the file again; if it is as its maker wrote it, the model was damaged when it was made.",
        )
