"""Copies into the window by the copy engine: beside a kernel, without multiprocessors."""

from __future__ import annotations

from typing import Any

import torch

from deepep.cuda import driver

_NO_TIMING = 2


class Copies:
    """Copies of one backend. `fork`, then any number of copies, then `join`: they run beside what was launched between.

    Everything can be captured in a CUDA graph.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        driver.ensure_context(device)
        self._side = torch.cuda.Stream(device)
        self._forked: Any = driver.call("cuEventCreate", _NO_TIMING)
        self._joined: Any = driver.call("cuEventCreate", _NO_TIMING)

    def fork(self, stream: int) -> None:
        """Let the copies that follow begin when `stream` has got here."""
        driver.ensure_context(self._device)
        driver.call("cuEventRecord", self._forked, stream)
        driver.call("cuStreamWaitEvent", self._side.cuda_stream, self._forked, 0)

    def copy_beside(self, target: int, source: int, num_bytes: int) -> None:
        """Copy `num_bytes` between two addresses, after `fork`."""
        self.copy(target, source, num_bytes, self._side.cuda_stream)

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Copy on `stream` itself."""
        driver.ensure_context(self._device)
        driver.call("cuMemcpyDtoDAsync", target, source, num_bytes, stream)

    def join(self, stream: int) -> None:
        """Let `stream` go on when the copies since `fork` are done."""
        driver.call("cuEventRecord", self._joined, self._side.cuda_stream)
        driver.call("cuStreamWaitEvent", stream, self._joined, 0)

    def close(self) -> None:
        """Give the events back; may be called twice."""
        events, self._forked, self._joined = (self._forked, self._joined), None, None
        for event in events:
            if event is not None:
                driver.call("cuEventDestroy", event)
