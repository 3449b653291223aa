"""One rank's process and the pipes to it, from the side of the process that spawned it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import socket
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from typing import Any

from deepep.testing.worker import work


class RankProcess:
    """A process that is to be a rank; `place` and `setup` as `worker.work` says.

    Attributes:
        process: the process; it has no id before `start`.
        connection: for jobs and replies.
        told: where it says where it is, see `whereabouts`.
    """

    def __init__(self, place: tuple[int, int, int], setup: tuple[str, str, float]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, self._theirs = context.Pipe()
        self.told, self._telling = context.Pipe(duplex=False)
        self.process: SpawnProcess = context.Process(
            target=work, args=(self._theirs, self._telling, place, setup), daemon=True, name=f"deepep-rank-{place[0]}"
        )

    def start(self) -> None:
        """Start it, and leave its ends of the pipes to it."""
        with self._theirs, self._telling, _single_threaded():
            self.process.start()

    def exchange(self, job: bytes | None, rank: int, arrived: queue.SimpleQueue[Any]) -> None:
        """Runs in a thread: a rank that is stopped or stuck blocks a full pipe, and half a reply, beyond any deadline.

        Sends `job`, if there is one, and puts the rank and its reply, None if it is gone, into the queue.
        """
        try:
            if job is not None:
                self.connection.send_bytes(job)
            arrived.put((rank, self.connection.recv_bytes()))
        except (EOFError, OSError):
            arrived.put((rank, None))

    def shut_down(self) -> None:
        """Wake the thread in `exchange`, even where a child of the rank still holds the other end open."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the pipes, once no thread uses them."""
        self.connection.close()
        self.told.close()


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    # The OpenMP pool is sized while torch is imported, before any code of ours runs in the child.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
