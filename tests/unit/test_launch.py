"""Local workers: results, errors, deaths and time limits, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepep.errors import InvalidArgument
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


class UnreadableResult:
    """It pickles on the rank, and fails to be made again in the parent."""

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return int, ("not a number",)


def answer_unreadably(group: Any, rank: int) -> object:
    return UnreadableResult() if group.rank() == rank else "stale"


def stop_within_the_answer(group: Any, rank: int) -> None:
    def send_half(connection: Connection, _: bytes) -> None:
        os.write(connection.fileno(), struct.pack("!i", 1000) + b"half")
        os.kill(os.getpid(), signal.SIGSTOP)

    if group.rank() == rank:
        Connection.send_bytes = send_half  # type: ignore[method-assign, assignment]


def measure(_: Any, data: bytes) -> int:
    return len(data)


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
        with pytest.raises(WorkerError, match=r"rank\(s\) 1 did not answer") as caught:
            workers.run(stall, 1, timeout=1.0)
        assert re.match(r"rank 1 was here:\n(.*\n)*.* in stall\n", str(caught.value.__cause__))
        assert not any(map(is_alive, pids))


def test_an_interrupted_run_leaves_no_answer_to_the_next() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with Workers(2) as workers:
        pids = workers.pids
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(KeyboardInterrupt):
                workers.run(stall, 1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        assert not any(map(is_alive, pids))
        assert [total for _, total, _ in workers.run(add, 1)] == [3, 3], "the next run starts new ones"


def test_an_answer_that_cannot_be_unpickled_is_that_ranks_error(workers: Workers) -> None:
    pids = workers.pids
    with pytest.raises(ValueError, match="not a number") as caught:
        workers.run(answer_unreadably, 0)
    assert "on rank 0:\nunpickling its answer failed" in str(caught.value.__cause__)
    assert [total for _, total, _ in workers.run(add, 1)] == [3, 3]
    assert workers.pids == pids


@pytest.mark.parametrize("within", ["job", "answer"])
def test_the_limit_holds_for_a_rank_stopped_within_a_message(within: str) -> None:
    with Workers(1) as workers:
        assert workers.run(measure, bytes(1 << 22)) == [1 << 22], "more than a pipe holds"
        pids = workers.pids
        if within == "job":
            os.kill(pids[0], signal.SIGSTOP)
        job = (measure, bytes(1 << 22)) if within == "job" else (stop_within_the_answer, 0)
        start = time.monotonic()
        with pytest.raises(WorkerError, match=r"rank\(s\) 0 did not answer \(limit 0.5 s\)"):
            workers.run(*job, timeout=0.5)
        assert time.monotonic() - start < 10.0
        assert not any(map(is_alive, pids))


def test_a_start_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = set(multiprocessing.active_children())
    workers = Workers(1, device="cuda")
    for _ in range(2):  # nor does a second call meet ranks without a group
        with pytest.raises(InvalidArgument, match='device="cuda", but rank 0 finds no CUDA device'):
            workers.run(add, 1)
        assert workers.pids == []
        assert set(multiprocessing.active_children()) == before


def test_a_start_that_is_interrupted_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def interrupt(workers: Workers, *_: object, **__: object) -> None:
        started.extend(workers.pids)
        raise KeyboardInterrupt

    monkeypatch.setattr(Workers, "_ask", interrupt)
    workers = Workers(2)
    with pytest.raises(KeyboardInterrupt):
        workers.__enter__()
    assert len(started) == 2
    assert workers.pids == []
    assert not any(map(is_alive, started))


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
