"""Local ranks as spawned processes: `Workers` keeps them for many calls, `spawn` runs one function and returns.

The functions that run on the ranks are pickled by name, so they live at the top level of an importable module.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from deepep.testing import whereabouts
from deepep.testing.rank_process import RankProcess
from deepep.testing.worker import LEAVE

# After one rank has failed its peers may wait for it in vain: how long they get to answer, seconds.
_GRACE = 15.0


class WorkerError(RuntimeError):
    """A rank failed, died or did not answer; the message names it and holds its traceback where there is one."""


@dataclass(frozen=True)
class DeadWorker:
    """Stands in the results of `Workers.run(..., allow_dead=True)` for a rank whose process is gone.

    Attributes:
        rank: the rank that died.
        exitcode: its exit status, negative for the signal that killed it.
    """

    rank: int
    exitcode: int | None


class Workers:
    """`num_ranks` local processes in one torch process group, kept alive between calls of `run`.

    A context manager. The processes start at `__enter__` (or at the first `run`), hold one torch thread each, and are
    gone at the latest when this process is. After a `run` that had to kill them the next `run` starts new ones.

    Args:
        num_ranks: how many processes, above 0.
        backend: of `init_process_group`: `"gloo"`, `"nccl"`, `"cpu:gloo,cuda:nccl"`.
        device: `"cpu"`, or `"cuda"`: then rank r works on GPU `r % device_count`.
        timeout: how long starting, and each collective of the process group, may take, seconds.
    """

    def __init__(self, num_ranks: int, *, backend: str = "gloo", device: str = "cpu", timeout: float = 120.0) -> None:
        if num_ranks < 1:
            raise ValueError(f"num_ranks={num_ranks}: expected at least 1")
        self.num_ranks = num_ranks
        self._setup = (backend, device, timeout)
        self._timeout = timeout
        self._ranks: list[RankProcess] = []
        self._exchanges: list[threading.Thread] = []
        self._store: TCPStore | None = None

    def __enter__(self) -> Workers:
        if not self._ranks:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process id of every rank, e.g. to kill one in a test."""
        return [rank.process.pid or 0 for rank in self._ranks]

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 120.0,
        allow_dead: bool = False,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Calls `fn(group, *args)` on every rank, `group` being the default process group.

        Args:
            fn: picklable, like `args` and what it returns (return CPU tensors).
            timeout: seconds for the whole call.
            allow_dead: a rank that dies gives a `DeadWorker` in its place, in this and later calls, and no error.
            return_exceptions: a rank that raises gives its exception in its place, and no error.

        Returns:
            What every rank returned, in rank order.

        Raises:
            WorkerError: a rank died or did not answer in time (its cause tells where such ranks were); all were killed
                then, as they are when this call is interrupted (Ctrl-C, a signal handler that raises): no later call
                can meet an answer to this one.
            Exception: what a rank raised, with a `WorkerError` holding rank and traceback as its cause. The ranks stay
                usable unless one of them still does not answer some seconds later.
        """
        if not self._ranks:
            self._start()
        replies = self._ask(pickle.dumps((fn, args)), timeout, allow_dead or return_exceptions, allow_dead)
        return [_unwrap(reply, return_exceptions) for reply in _failures_first(replies, return_exceptions)]

    def close(self) -> None:
        """Ends the processes: politely at first, then by SIGKILL. May be called twice."""
        try:
            for rank in self._ranks:
                with contextlib.suppress(OSError):
                    rank.connection.send_bytes(LEAVE)
            limit = time.monotonic() + 3.0
            for rank in self._ranks:
                # A stopped process will never leave by itself, and one that failed to answer has been killed before.
                rank.process.join(max(0.0, limit - time.monotonic()))
        finally:
            self._kill()

    def _start(self) -> None:
        # The store listens here, on a port the kernel chose while binding: no race, and no rank's death takes it along.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            for rank in range(self.num_ranks):
                self._ranks.append(RankProcess((rank, self.num_ranks, self._store.port), self._setup))
                self._ranks[rank].start()
            for reply in self._ask(None, self._timeout, patient=False, allow_dead=False):
                _unwrap(reply, return_exceptions=False)
        except BaseException:
            self._kill()  # ranks that are not in a group are of no use, and `__exit__` will not be called
            raise

    def _ask(self, job: bytes | None, timeout: float, patient: bool, allow_dead: bool) -> list[_Reply]:
        """Sends `job` (None: nothing) and waits for one reply per rank; whatever it raises, all ranks are gone then.

        `patient` gives all ranks the whole time although one has failed.
        """
        deadline = time.monotonic() + timeout
        arrived: queue.SimpleQueue[tuple[int, bytes | None]] = queue.SimpleQueue()
        replies: dict[int, _Reply] = {}
        try:
            self._exchanges = [
                threading.Thread(target=one.exchange, args=(job, rank, arrived), daemon=True)
                for rank, one in enumerate(self._ranks)
            ]
            for exchange in self._exchanges:
                exchange.start()
            while len(replies) < self.num_ranks:
                try:
                    rank, data = arrived.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                reply = replies[rank] = self._read(rank, data)
                if reply.failed and not patient:
                    deadline = min(deadline, time.monotonic() + _GRACE)
            self._check(replies, timeout, allow_dead)
        except BaseException:
            self._kill()
            raise
        return [replies[rank] for rank in range(self.num_ranks)]

    def _read(self, rank: int, data: bytes | None) -> _Reply:
        if data is None:
            process = self._ranks[rank].process
            process.join(5.0)
            return _Reply(rank, "dead", DeadWorker(rank, process.exitcode))
        try:
            return _Reply(rank, *pickle.loads(data))
        except Exception as error:  # noqa: BLE001  the other ranks' replies are still to be collected
            return _Reply(rank, "error", error, f"unpickling its answer failed here:\n{traceback.format_exc()}")

    def _check(self, replies: dict[int, _Reply], timeout: float, allow_dead: bool) -> None:
        silent = [rank for rank in range(self.num_ranks) if rank not in replies]
        dead = [] if allow_dead else [reply.value for reply in replies.values() if reply.status == "dead"]
        if not silent and not dead:
            return
        notes = [f"rank {item.rank} died (exit code {item.exitcode})" for item in dead]
        if silent:
            notes.append(f"rank(s) {', '.join(map(str, silent))} did not answer (limit {timeout:g} s)")
        notes += [f"rank {reply.rank} raised:\n{reply.trace}" for reply in replies.values() if reply.status == "error"]
        stacks = whereabouts.ask({rank: (self.pids[rank], self._ranks[rank].told) for rank in silent})
        raise WorkerError("; ".join(notes)) from (WorkerError(stacks) if stacks else None)

    def _kill(self) -> None:
        ranks, exchanges = self._ranks, self._exchanges
        self._ranks, self._exchanges = [], []  # at once: a second Ctrl-C may cut this short
        started = [rank.process for rank in ranks if rank.process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()
            process.close()
        for rank in ranks:
            rank.shut_down()
        for exchange in exchanges:
            if exchange.is_alive():
                exchange.join()
        for rank in ranks:
            rank.close()
        self._store = None


def spawn(
    fn: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    backend: str = "gloo",
    device: str = "cpu",
    timeout: float = 600.0,
) -> list[Any]:
    """Runs `fn(group, *args)` once on `num_ranks` fresh local processes and returns the results in rank order.

    Arguments and errors are those of `Workers` and `Workers.run`; `timeout` covers the call, seconds.
    """
    with Workers(num_ranks, backend=backend, device=device) as workers:
        return workers.run(fn, *args, timeout=timeout)


@dataclass(frozen=True)
class _Reply:
    """One rank's answer: status `ok` (value: the result), `error` (value: the exception or None), `dead`."""

    rank: int
    status: str
    value: Any
    trace: str = ""

    @property
    def failed(self) -> bool:
        return self.status != "ok"


def _failures_first(replies: list[_Reply], return_exceptions: bool) -> list[_Reply]:
    errors = [reply for reply in replies if reply.status == "error"]
    # Ranks that raised something of their own tell more than ranks that only waited for them in vain.
    errors.sort(key=lambda reply: isinstance(reply.value, TimeoutError))
    return errors[:1] if errors and not return_exceptions else replies


def _unwrap(reply: _Reply, return_exceptions: bool) -> Any:
    if reply.status != "error":
        return reply.value
    cause = WorkerError(f"on rank {reply.rank}:\n{reply.trace}")
    if reply.value is None:
        raise cause
    reply.value.__cause__ = cause
    if return_exceptions:
        return reply.value
    raise reply.value
