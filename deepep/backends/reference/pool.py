"""Memory for rows on the CPU, used again when the tensors that lay in it are gone.

The kernel maps fresh memory page by page, and clears it: for large tensors that takes longer than copying the rows.
CUDA tensors do not need this, torch caches their memory.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch

# Smaller memory is not worth keeping: malloc has it at hand.
_MIN_BYTES = 1 << 20
# A block is not handed out for a tensor of less than this part of its size.
_MIN_USE = 0.5
# What lies idle beyond this is given back, oldest first.
_MAX_IDLE_BYTES = 1 << 30


class RowPool:
    """Gives uninitialised rows. Thread-safe, since tensors may die on any thread."""

    def __init__(self) -> None:
        # Re-entrant: a tensor may die, by garbage collection, while this thread holds the lock.
        self._lock = threading.RLock()
        self._idle: list[np.ndarray] = []

    @property
    def num_idle_bytes(self) -> int:
        """Bytes that wait for a tensor."""
        return sum(block.nbytes for block in self._idle)

    def empty(self, num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Give a contiguous tensor [num_rows, width] of unspecified content."""
        num_bytes = num_rows * width * dtype.itemsize
        if device.type != "cpu" or num_bytes < _MIN_BYTES:
            return torch.empty(num_rows, width, dtype=dtype, device=device)
        block = self._take(num_bytes)
        lease = block[:num_bytes]
        # The tensor holds the lease, and nothing else does: it ends with the last tensor on this memory.
        weakref.finalize(lease, self._give_back, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(num_rows, width)

    def clear(self) -> None:
        """Give idle memory back to the system; what is in use follows when its tensors are gone."""
        with self._lock:
            self._idle.clear()

    def _take(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            fitting = [block for block in self._idle if _MIN_USE * block.nbytes <= num_bytes <= block.nbytes]
            if fitting:
                best = min(fitting, key=lambda block: block.nbytes)
                self._idle = [block for block in self._idle if block is not best]
                return best
        return np.empty(num_bytes, dtype=np.uint8)

    def _give_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._idle.append(block)
            while self.num_idle_bytes > _MAX_IDLE_BYTES:
                self._idle.pop(0)


#: Of this process; buffers come and go, the sizes of their rows stay.
row_pool = RowPool()
