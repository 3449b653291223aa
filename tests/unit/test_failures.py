"""A rank that dies or stops in the middle of an operation: the others name it in time, and no process hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any, NamedTuple

import pytest
import torch

from deepep import Buffer, BufferDestroyed, CommTimeout
from deepep.testing.launch import DeadWorker, Workers
from deepep.testing.routing import Case, make_inputs

VICTIM, NUM_RANKS, TIMEOUT = 2, 4, 4.0
CASE = Case((32,) * NUM_RANKS, 64, 8, 4)


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


def lose_a_rank(group: Any, number: int, sig: int) -> Report | None:
    buffer = Buffer(group, backend="reference", timeout=TIMEOUT)
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
@pytest.mark.parametrize(("number", "op"), [(1, "dispatch"), (3, "dispatch"), (6, "dispatch"), (9, "combine")])
def test_a_killed_rank_is_named_by_the_others(number: int, op: str) -> None:
    with Workers(NUM_RANKS) as workers:
        reports = workers.run(lose_a_rank, number, signal.SIGKILL, timeout=60.0, allow_dead=True)
    assert reports.pop(VICTIM) == DeadWorker(VICTIM, -signal.SIGKILL)
    for report in reports:
        assert report.op == op
        assert report.missing_ranks == (VICTIM,)
        assert report.seconds < TIMEOUT + 2.0
        assert "broke" in report.next_call


def test_a_stopped_rank_is_named_by_the_others_and_does_not_hang_when_it_goes_on() -> None:
    with Workers(NUM_RANKS) as workers:
        waker = threading.Timer(3 * TIMEOUT, os.kill, (workers.pids[VICTIM], signal.SIGCONT))
        waker.start()
        try:
            reports = workers.run(lose_a_rank, 3, signal.SIGSTOP, timeout=90.0)
        finally:
            waker.cancel()
    late = reports.pop(VICTIM)
    assert late is not None
    for report in reports:
        assert (report.op, report.missing_ranks) == ("dispatch", (VICTIM,))
        assert TIMEOUT - 0.5 < report.seconds < TIMEOUT + 2.0
