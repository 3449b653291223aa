"""A rank that is lost: the others hear which it was, keep their GPU, and go on without it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu_steps import step

import deepep
from deepep.testing.launch import Workers

NUM_RANKS = 4
VICTIM = 2
TIMEOUT = 3.0
WARM_UP_TIMEOUT = 30.0


@pytest.mark.parametrize("how", ["stays away", "is killed"])
def test_the_others_name_the_lost_rank_and_go_on(how: str) -> None:
    with Workers(NUM_RANKS, device="cuda") as workers:
        results = workers.run(lose_a_rank, how, timeout=120, allow_dead=True, return_exceptions=True)
    seen = {rank: result for rank, result in enumerate(results) if rank != VICTIM and result != "went on"}
    assert not seen, seen


def lose_a_rank(group: Any, how: str) -> str:
    rank = dist.get_rank(group)
    others = dist.new_group([other for other in range(NUM_RANKS) if other != VICTIM])
    warm_up(group)
    buffer = deepep.Buffer(group, backend="ipc", timeout=TIMEOUT)
    step(buffer, NUM_RANKS)
    dist.barrier(group)  # nobody reads the victim's window any more
    if rank == VICTIM:
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return "stayed away"
    started = time.monotonic()
    with pytest.raises(deepep.CommTimeout) as caught:
        step(buffer, NUM_RANKS)
    assert caught.value.missing_ranks == (VICTIM,), str(caught.value)
    assert time.monotonic() - started < TIMEOUT + 5
    with pytest.raises(deepep.BufferDestroyed):
        step(buffer, NUM_RANKS)
    buffer.destroy()
    assert int(torch.ones(4, device="cuda").sum()) == 4  # the context lives
    smaller = deepep.Buffer(others, backend="ipc", timeout=TIMEOUT)
    for _ in range(3):
        step(smaller, NUM_RANKS - 1)
    dist.barrier(others)
    smaller.destroy()
    return "went on"


def warm_up(group: Any) -> None:
    """Load kernels and modules: ranks do so at different speeds, and a short limit would take the slow for lost."""
    buffer = deepep.Buffer(group, backend="ipc", timeout=WARM_UP_TIMEOUT)
    step(buffer, NUM_RANKS)
    buffer.destroy()
