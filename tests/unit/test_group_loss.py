"""A rank that dies or stops in the middle of an exchange: exactly it is named, by all others, in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from deepep.errors import CommTimeout
from deepep.group import make_group
from deepep.testing.launch import DeadWorker, Workers

NUM_RANKS = 7
# Each is lost once, from a process group of ranks 0, 1, 2 and itself.
LOST = [3, 4, 5, 6]
_groups: dict[int, Any] = {}


def make_groups(group: Any) -> None:
    for lost in LOST:
        members = dist.new_group([0, 1, 2, lost])
        _groups[lost] = make_group(members) if group.rank() in (0, 1, 2, lost) else None


def lose_one(_: Any, lost: int, signal_number: int, num_bytes: int, delay: float, timeout: float) -> Any:
    group = _groups[lost]
    if group is None:
        return None
    group.barrier(op="warm-up", timeout=30.0)
    send = [torch.full((num_bytes,), group.rank, dtype=torch.uint8) for _ in range(4)]
    recv = [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(4)]
    start = time.monotonic()
    if group.rank == 3:
        threading.Timer(delay, os.kill, (os.getpid(), signal_number)).start()
    try:
        while True:
            group.exchange(send, recv, op="test", timeout=timeout)
            group.all_gather_object("more", op="test", timeout=timeout)
    except CommTimeout as error:
        return error.missing_ranks, time.monotonic() - start


def check(results: list[Any], limit: float) -> None:
    assert [missing for missing, _ in results[:3]] == [(3,)] * 3
    assert max(seconds for _, seconds in results[:3]) < limit


def test_a_killed_rank_is_named_by_all_others_and_at_once() -> None:
    with Workers(NUM_RANKS) as workers:
        workers.run(make_groups)
        for lost, num_bytes, delay in ((6, 8 << 20, 0.0), (5, 8 << 20, 0.03), (4, 1 << 10, 0.01)):
            results = workers.run(lose_one, lost, signal.SIGKILL, num_bytes, delay, 60.0, allow_dead=True)
            check(results, limit=20.0)
            assert results[lost] == DeadWorker(lost, -signal.SIGKILL)

        stopped = workers.pids[3]
        timer = threading.Timer(6.0, os.kill, (stopped, signal.SIGCONT))
        timer.start()
        results = workers.run(lose_one, 3, signal.SIGSTOP, 8 << 20, 0.02, 2.0, allow_dead=True)
        timer.join()
        check(results, limit=15.0)
        assert set(results[3][0]) <= {0, 1, 2}, "once it goes on it learns that the others have given up"
