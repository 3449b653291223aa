"""Operations of one buffer run one after another, as they were called, whichever streams they were called on.

Ranks must go through them in the same order: kernels of two operations side by side would take each other's words, or
each keep the multiprocessors that the other one's peers wait for.
"""

from __future__ import annotations

import contextlib
from typing import Any

from deepep.cuda import driver
from deepep.errors import DeepEPError

_NO_TIMING = 2


class CallOrder:
    """Remembers the stream of the last operation, which must exist when the next one comes on another stream.

    As long as all come on one stream nothing is to be done. From the first that does not, an event is recorded behind
    each, so that later ones wait for operations, and not for what else their streams have got.
    """

    def __init__(self) -> None:
        self._last: int | None = None
        self._event: Any = None
        self._is_recorded = False  # behind the last operation

    def enter(self, stream: int) -> None:
        """Let what `stream` gets from now on wait for the operation before, if that was another stream's.

        Graphs hold their own work only: between an operation inside a capture and one outside there is no order.
        """
        last = self._last
        if last == stream:
            return
        self._last = stream
        if last is None:
            return
        is_captured, is_recorded = _is_capturing(stream), self._is_recorded
        self._is_recorded = False
        if _is_capturing(last) != is_captured:
            return
        if is_captured or not is_recorded:  # what was recorded may be of a capture that is over
            self._record(last)
        driver.call("cuStreamWaitEvent", stream, self._event, 0)

    def leave(self, stream: int) -> None:
        """An operation, or a part of it, was launched on `stream`."""
        if self._event is None or stream != self._last:
            return
        self._is_recorded = not _is_capturing(stream)
        if self._is_recorded:
            self._record(stream)

    def close(self) -> None:
        """Give the event back; may be called twice, never raises."""
        event, self._event, self._last = self._event, None, None
        if event is not None:
            with contextlib.suppress(DeepEPError):
                driver.call("cuEventDestroy", event)

    def _record(self, stream: int) -> None:
        if self._event is None:
            self._event = driver.call("cuEventCreate", _NO_TIMING)
        driver.call("cuEventRecord", self._event, stream)


def _is_capturing(stream: int) -> bool:
    try:
        return int(driver.call("cuStreamIsCapturing", stream)) != 0
    except driver.CudaError:
        return False  # the default stream does not say while others are captured; it is none of theirs
