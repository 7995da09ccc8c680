"""Cached keys and values: one growing buffer per sequence.

A sequence owns its buffer alone; it starts small and doubles, so that what a job holds follows what it has
written and not the longest it might become.
"""

import torch
from torch import Tensor

from rbee_worker.runtime.model_config import ModelConfig

_FIRST_CAPACITY = 256


class SequenceCache:
    """Keys and values of one sequence: [layers, 2, kv_heads, capacity, head_dim] in the activation dtype.

    Attributes:
        length: positions written so far.
    """

    __slots__ = ("_data", "_limit", "length")

    def __init__(self, config: ModelConfig, limit: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        self._limit = limit
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, min(_FIRST_CAPACITY, limit), config.head_dim)
        self._data = torch.empty(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held, written or not."""
        return self._data.nbytes

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more positions; what is written stays.

        Raises:
            RuntimeError: beyond the limit given at construction, or the device is out of memory.
        """
        needed = self.length + tokens
        capacity = self._data.shape[3]
        if needed <= capacity:
            return
        if needed > self._limit:
            raise RuntimeError(f"{needed} positions asked of a cache limited to {self._limit}")
        while capacity < needed:
            capacity *= 2
        shape = (*self._data.shape[:3], min(capacity, self._limit), self._data.shape[4])
        grown = torch.empty(shape, dtype=self._data.dtype, device=self._data.device)
        grown[:, :, :, : self.length] = self._data[:, :, :, : self.length]
        self._data = grown

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [tokens, kv_heads, head_dim] behind ``length``.

        Room must have been reserved. ``length`` moves on only when the step is over (:meth:`advance`), since every
        layer writes at the same place.

        Returns:
            All keys and all values so far, the new ones included: each [kv_heads, positions, head_dim].
        """
        end = self.length + keys.shape[0]
        cached_keys, cached_values = self._data[layer, 0, :, :end], self._data[layer, 1, :, :end]
        cached_keys[:, self.length :] = keys.transpose(0, 1)
        cached_values[:, self.length :] = values.transpose(0, 1)
        return cached_keys, cached_values

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` positions as written by every layer."""
        self.length += tokens
