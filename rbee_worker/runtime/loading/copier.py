"""Buffers on the host, by way of which weights that were read come to their place, in pieces."""

import torch
from torch import Tensor

_CONVERT_BYTES = 2**20
"""What is checked and converted at once: small enough that it is still in the cache when it is read again."""


class Copier:
    """Bytes to their place through a buffer on the host that stays in the processor's cache.

    Attributes:
        nbytes: the most that is copied at once.
    """

    def __init__(self) -> None:
        self.nbytes = _CONVERT_BYTES
        self._buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        self._floats = torch.empty(self.nbytes // 2, dtype=torch.float32)

    def buffer(self, nbytes: int) -> Tensor:
        """Host memory to read into, uint8 [nbytes]; after :meth:`copy` it may be asked for again."""
        return self._buffer[:nbytes]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy what was read, converting it to the target's dtype."""
        if source.dtype != target.dtype and source.itemsize == target.itemsize:
            # From one 16-bit type to the other torch goes element by element; by way of float32, three times as fast.
            source = self._floats[: len(source)].copy_(source)
        target.copy_(source)

    def finish(self) -> None:
        """Wait until everything is in place."""


class PinnedCopier(Copier):
    """The same for CUDA: two page-locked buffers, one read into while the other is copied on a stream of its own."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def buffer(self, nbytes: int) -> Tensor:
        """The buffer whose last copy is the longest ago, once that is done."""
        self._turn ^= 1
        self._copied[self._turn].synchronize()
        return self._buffers[self._turn][:nbytes]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Queue the copy: in the stored dtype over the bus, converted on the device."""
        # The target's memory may have been another tensor's, which work queued on the current stream still uses.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source.to(self._device, non_blocking=True))
            self._copied[self._turn].record(self._stream)

    def finish(self) -> None:
        """Wait for the stream: what was copied is where it will be used."""
        self._stream.synchronize()
