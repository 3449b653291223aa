"""A rank that dies: the others hear who it was, keep their GPU, and go on without it."""

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


def test_a_killed_rank_is_named_and_the_others_go_on() -> None:
    with Workers(NUM_RANKS, device="cuda") as workers:
        results = workers.run(lose_a_rank, timeout=120, return_exceptions=True)
    for rank, result in enumerate(results):
        if rank != VICTIM:
            assert result == "went on", f"rank {rank}: {result}"


def lose_a_rank(group: Any) -> str:
    rank = dist.get_rank(group)
    survivors = dist.new_group([other for other in range(NUM_RANKS) if other != VICTIM])
    buffer = deepep.Buffer(group, backend="ipc", timeout=TIMEOUT)
    step(buffer, NUM_RANKS)
    if rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(deepep.CommTimeout) as caught:
        step(buffer, NUM_RANKS)
    assert caught.value.missing_ranks == (VICTIM,), str(caught.value)
    assert time.monotonic() - started < TIMEOUT + 5
    with pytest.raises(deepep.BufferDestroyed):
        step(buffer, NUM_RANKS)
    buffer.destroy()
    assert int(torch.ones(4, device="cuda").sum()) == 4  # the context lives
    smaller = deepep.Buffer(survivors, backend="ipc", timeout=TIMEOUT)
    for _ in range(3):
        step(smaller, NUM_RANKS - 1)
    smaller.destroy()
    return "went on"
