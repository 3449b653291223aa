"""Local workers: results, errors, deaths and time limits, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepep.testing.launch import DeadWorker, WorkerError, Workers, spawn


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as started:
        yield started


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def add(group: Any, value: int) -> tuple[int, int, int]:
    total = torch.tensor(group.rank() + value)
    dist.all_reduce(total)
    return os.getpid(), int(total), torch.get_num_threads()


def fail(group: Any, rank: int, kind: type[Exception]) -> str:
    if group.rank() == rank:
        raise kind("on purpose")
    return "fine"


def die(group: Any, rank: int) -> str:
    if group.rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return "fine"


def stall(group: Any, rank: int) -> None:
    if group.rank() == rank:
        time.sleep(60.0)


class Unpicklable(Exception):
    """It pickles, yet cannot be made again from one argument."""

    def __init__(self, text: str) -> None:
        super().__init__(text, "more")


def test_ranks_answer_in_order_and_stay(workers: Workers) -> None:
    for value in (1, 5):
        results = workers.run(add, value)
        assert results == [(pid, 2 * value + 1, 1) for pid in workers.pids]


def test_an_exception_is_raised_again_with_rank_and_traceback(workers: Workers) -> None:
    pids = workers.pids
    with pytest.raises(KeyError) as caught:
        workers.run(fail, 1, KeyError)
    assert "on rank 1" in str(caught.value.__cause__)
    assert "in fail" in str(caught.value.__cause__)
    with pytest.raises(WorkerError, match="on purpose"):
        workers.run(fail, 1, Unpicklable)
    results = workers.run(fail, 1, KeyError, return_exceptions=True)
    assert results[0] == "fine"
    assert isinstance(results[1], KeyError)
    assert workers.pids == pids


def test_ranks_that_die_or_do_not_answer_are_named() -> None:
    with Workers(2) as workers:
        pids = workers.pids
        assert workers.run(die, 1, allow_dead=True) == ["fine", DeadWorker(1, -signal.SIGKILL)]
        assert workers.run(die, 1, allow_dead=True) == ["fine", DeadWorker(1, -signal.SIGKILL)]
        with pytest.raises(WorkerError, match="rank 1 died"):
            workers.run(die, 0)
        assert not any(map(is_alive, pids))
        assert workers.run(add, 1)[0][1] == 3, "the next run starts new ones"

        pids = workers.pids
        with pytest.raises(WorkerError, match=r"rank\(s\) 1 did not answer"):
            workers.run(stall, 1, timeout=1.0)
        assert not any(map(is_alive, pids))


def test_spawn_runs_once_and_leaves_nothing() -> None:
    results = spawn(add, 2, 3)
    assert [total for _, total, _ in results] == [7, 7]
    assert not any(is_alive(pid) for pid, _, _ in results)


def test_workers_do_not_outlive_a_killed_parent() -> None:
    program = (
        "import time; from deepep.testing.launch import Workers\n"
        "if __name__ == '__main__':\n"
        "    workers = Workers(1).__enter__(); print(*workers.pids, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(text) for text in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 1
    limit = time.monotonic() + 20.0
    while any(map(is_alive, pids)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_num_ranks_is_checked() -> None:
    with pytest.raises(ValueError, match="num_ranks=0"):
        Workers(0)
