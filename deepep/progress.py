"""Progress bars on the terminal, where tqdm is installed."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any


class _Silent:
    """Takes the place of a bar that is not shown."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        """Nothing to draw."""

    def set_postfix_str(self, text: str) -> None:
        """Likewise."""


def progress_bar(total: int, what: str, unit: str, *, is_shown: bool = True) -> AbstractContextManager[Any]:
    """Give a bar with `update()` and `set_postfix_str(text)`; one that draws nothing unless `is_shown` with tqdm there.

    Args:
        total: steps until it is full.
        what: is being done, in front of the bar.
        unit: what one step is.
        is_shown: usually on the first rank only.
    """
    if not is_shown:
        return _Silent()
    try:
        from tqdm import tqdm
    except ImportError:
        return _Silent()
    # Its own lock is a semaphore between processes, which would outlive a rank that is killed or leaves by os._exit.
    tqdm.set_lock(threading.RLock())
    return tqdm(total=total, desc=what, unit=unit)
