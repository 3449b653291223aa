"""A rank that dies or stops in the middle of an operation: the others name it in time, and no process hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from deepep import Buffer, BufferDestroyed, CommTimeout
from deepep.testing.launch import DeadWorker, Workers
from deepep.testing.routing import Case, make_inputs

NUM_RANKS, TIMEOUT = 4, 4.0
CASE = Case((32,) * NUM_RANKS, 64, 8, 4)
# Each is lost once, as the last of a process group of ranks 0, 1, 2 and itself.
LOST = (3, 4, 5, 6, 7)
VICTIM = NUM_RANKS - 1
_groups: dict[int, Any] = {}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(VICTIM + len(LOST)) as running:
        running.run(make_groups)
        yield running


def make_groups(group: Any) -> None:
    for lost in LOST:
        members = dist.new_group([0, 1, 2, lost])
        _groups[lost] = members if group.rank() in (0, 1, 2, lost) else None


class Report(NamedTuple):
    """What a survivor saw."""

    op: str
    missing_ranks: tuple[int, ...]
    seconds: float
    next_call: str


def one_layer(buffer: Buffer) -> None:
    inputs = make_inputs(CASE, buffer.rank)
    per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(inputs.topk_idx, CASE.num_experts)
    recv_x, _, _, _, handle, _ = buffer.dispatch(
        inputs.x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_host,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=inputs.topk_idx,
        topk_weights=inputs.topk_weights,
    )
    assert handle is not None
    assert isinstance(recv_x, torch.Tensor)
    buffer.combine(recv_x, handle)


def signal_before(buffer: Buffer, number: int, sig: int) -> None:
    """Let this process send itself a signal when it is about to make the exchange of this number."""
    group: Any = buffer._group
    original, count = group._exchange_bytes, [0]

    def exchange(*args: Any) -> None:
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), sig)
        original(*args)

    group._exchange_bytes = exchange


def lose_a_rank(_: Any, lost: int, number: int, sig: int) -> Report | None:
    if _groups[lost] is None:
        return None
    buffer = Buffer(_groups[lost], backend="reference", timeout=TIMEOUT)
    one_layer(buffer)
    if buffer.rank == VICTIM:
        signal_before(buffer, number, sig)
    started = time.monotonic()
    try:
        one_layer(buffer)
    except CommTimeout as error:
        seconds = time.monotonic() - started
        with pytest.raises(BufferDestroyed) as caught:
            one_layer(buffer)
        buffer.destroy()
        return Report(error.op, error.missing_ranks, seconds, str(caught.value))
    return None


# A dispatch exchanges notices (two exchanges), top-k, weights, source tokens and rows; then combine begins.
@pytest.mark.parametrize(
    ("lost", "number", "op"), [(3, 1, "dispatch"), (4, 3, "dispatch"), (5, 6, "dispatch"), (6, 9, "combine")]
)
def test_a_killed_rank_is_named_by_the_others(workers: Workers, lost: int, number: int, op: str) -> None:
    reports = workers.run(lose_a_rank, lost, number, signal.SIGKILL, timeout=60.0, allow_dead=True)
    assert reports[lost] == DeadWorker(lost, -signal.SIGKILL)
    for report in reports[:VICTIM]:
        assert report.op == op
        assert report.missing_ranks == (VICTIM,)
        assert report.seconds < TIMEOUT + 2.0
        assert "broke" in report.next_call


def test_a_stopped_rank_is_named_by_the_others_and_does_not_hang_when_it_goes_on(workers: Workers) -> None:
    lost = LOST[-1]
    waker = threading.Timer(2 * TIMEOUT + 1.0, os.kill, (workers.pids[lost], signal.SIGCONT))
    waker.start()
    try:
        reports = workers.run(lose_a_rank, lost, 3, signal.SIGSTOP, timeout=90.0, allow_dead=True)
    finally:
        waker.cancel()
    assert isinstance(reports[lost], Report)
    for report in reports[:VICTIM]:
        assert (report.op, report.missing_ranks) == ("dispatch", (VICTIM,))
        assert TIMEOUT - 0.5 < report.seconds < TIMEOUT + 2.0
