"""Where a rank is that does not answer: the Python stacks of its threads, which it tells in a signal handler.

That works whatever the rank is busy with, inside a driver or a collective, too; not while it is stopped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection

_SIGNAL = signal.SIGUSR2
# How long a rank gets to tell the first line, and each one after it, seconds.
_FIRST, _NEXT = 1.0, 0.1


def tell_when_asked(told: Connection) -> None:
    """In the rank: from now on, write where its threads are to `told` whenever `ask` wants it. Keep `told` open."""
    faulthandler.register(_SIGNAL, file=told.fileno(), all_threads=True)


def ask(ranks: Mapping[int, tuple[int, Connection]]) -> str:
    """Ask ranks where they are.

    Args:
        ranks: process id and the end of the pipe that is read from, by rank.

    Returns:
        A paragraph for each rank that tells, innermost call first; nothing of the others. A rank that has not come so
        far as to listen ends instead.
    """
    for pid, _ in ranks.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, _SIGNAL)
    stacks = {rank: _read(told) for rank, (_, told) in ranks.items()}
    return "\n".join(f"rank {rank} was here:\n{stack}" for rank, stack in stacks.items() if stack)


def _read(told: Connection) -> str:
    stack, patience = b"", _FIRST
    with contextlib.suppress(OSError):
        while told.poll(patience) and (piece := os.read(told.fileno(), 1 << 16)):
            stack, patience = stack + piece, _NEXT
    return stack.decode(errors="replace")
