"""Operations of one buffer run one after another, as they were called, whichever streams they were called on.

Ranks must go through them in the same order: kernels of two operations side by side would take each other's words, or
each keep the multiprocessors that the other one's peers wait for.
"""

from __future__ import annotations

from typing import Any

from deepep.cuda import driver

_NO_TIMING = 2


class CallOrder:
    """Remembers the stream of the last operation. It must exist when the next one comes on another stream."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._event: Any = None

    def enter(self, stream: int) -> None:
        """Let what `stream` gets from now on wait for the operation before, if that was another stream's.

        Graphs hold their own work only: between an operation inside a capture and one outside there is no order.
        """
        last, self._last = self._last, stream
        if last is None or last == stream or _is_capturing(last) != _is_capturing(stream):
            return
        if self._event is None:
            self._event = driver.call("cuEventCreate", _NO_TIMING)
        driver.call("cuEventRecord", self._event, last)
        driver.call("cuStreamWaitEvent", stream, self._event, 0)

    def close(self) -> None:
        """Give the event back; may be called twice."""
        event, self._event, self._last = self._event, None, None
        if event is not None:
            driver.call("cuEventDestroy", event)


def _is_capturing(stream: int) -> bool:
    try:
        return int(driver.call("cuStreamIsCapturing", stream)) != 0
    except driver.CudaError:
        return False  # the default stream does not say while others are captured; it is none of theirs
