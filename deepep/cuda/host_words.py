"""Pinned words that kernels write and the CPU reads: counts, and the status of a kernel that gave up."""

from __future__ import annotations

import contextlib
import ctypes

from deepep.cuda import driver
from deepep.cuda.launch import wait_for_words
from deepep.errors import DeepEPError

_PORTABLE, _DEVICE_MAPPED = 1, 2


class HostWords:
    """64-bit words `epoch << 32 | value` in page-locked memory that the current device can write; zero at first.

    Attributes:
        address: of the first word, on the host.
        device_address: the same word as kernels see it.
        num_words: how many.
    """

    def __init__(self, num_words: int) -> None:
        num_bytes = 8 * num_words
        self.num_words = num_words
        self.address = int(driver.call("cuMemHostAlloc", num_bytes, _PORTABLE | _DEVICE_MAPPED))
        self.device_address = int(driver.call("cuMemHostGetDevicePointer", self.address, 0))
        self._words = (ctypes.c_uint64 * num_words).from_address(self.address)
        ctypes.memset(self.address, 0, num_bytes)

    def __getitem__(self, index: int) -> int:
        """Read a word as it is now."""
        return self._words[index]

    def __setitem__(self, index: int, word: int) -> None:
        """Write a word; kernels already running may not see it."""
        self._words[index] = word

    def wait(
        self, first: int, num_words: int, epoch: int, timeout: float, stop: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Wait for words `[first, first + num_words)` to carry `epoch`, or for word `stop` to; see `wait_for_words`."""
        stop_address = 0 if stop is None else self.address + 8 * stop
        return wait_for_words(self.address + 8 * first, num_words, epoch, timeout, stop_address)

    def free(self) -> None:
        """Give the memory back; may be called twice, never raises. No kernel may still write to it."""
        address, self.address = self.address, 0
        if address:
            with contextlib.suppress(DeepEPError):
                driver.call("cuMemFreeHost", address)
