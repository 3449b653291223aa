"""Pinned words that kernels write and the CPU reads: counts, and the status of a kernel that gave up."""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np

from deepep.cuda import driver
from deepep.errors import DeepEPError

_PORTABLE, _DEVICE_MAPPED = 1, 2


class HostWords:
    """Page-locked memory that the current device can write; zero at first.

    Attributes:
        host: uint64 array over it.
        host_address: of the first word, on the host.
        device_address: the same word as kernels see it.
    """

    def __init__(self, num_bytes: int) -> None:
        num_words = -(-num_bytes // 8)
        self.host_address = int(driver.call("cuMemHostAlloc", 8 * num_words, _PORTABLE | _DEVICE_MAPPED))
        self.device_address = int(driver.call("cuMemHostGetDevicePointer", self.host_address, 0))
        words = (ctypes.c_uint64 * num_words).from_address(self.host_address)
        self.host = np.ctypeslib.as_array(words)
        self.host[:] = 0

    def close(self) -> None:
        """Give the memory back; may be called twice, never raises. No kernel may still write to it."""
        address, self.host_address = self.host_address, 0
        if address:
            self.host = np.zeros(0, dtype=np.uint64)
            with contextlib.suppress(DeepEPError):
                driver.call("cuMemFreeHost", address)
