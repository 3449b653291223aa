"""Nothing leaks: over many calls, and over buffers made and destroyed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu_steps import Step, step

import deepep
from deepep.testing.launch import Workers

NUM_CALLS = int(os.environ.get("DEEPEP_TEST_CALLS", "10000"))
NUM_BUFFERS = 50
SLACK_BYTES = 64 << 20


@pytest.mark.timeout(520)
@pytest.mark.parametrize("what", ["calls", "buffers"])
def test_memory_stays_where_it_was(what: str) -> None:
    with Workers(2, device="cuda") as workers:
        workers.run(many_calls if what == "calls" else many_buffers, timeout=500)


def many_calls(group: Any) -> None:
    buffer = deepep.Buffer(group, backend="ipc", timeout=20)
    prepared = Step(buffer, 2)
    grown = growth(group, prepared.run, num_warmups=50, num_runs=NUM_CALLS // 2)  # two calls a run
    prepared.check(prepared.run())
    buffer.destroy()
    assert grown < SLACK_BYTES, f"{NUM_CALLS} calls took {grown} bytes"


def many_buffers(group: Any) -> None:
    def cycle() -> None:
        buffer = deepep.Buffer(group, backend="ipc", timeout=20)
        step(buffer, 2)
        buffer.destroy()

    grown = growth(group, cycle, num_warmups=3, num_runs=NUM_BUFFERS)
    assert grown < SLACK_BYTES, f"{NUM_BUFFERS} buffers took {grown} bytes"


def growth(group: Any, run: Any, num_warmups: int, num_runs: int) -> int:
    """Give the bytes of GPU memory that `num_runs` took away for good, all ranks together where they share a GPU."""
    for _ in range(num_warmups):
        run()
    before = free_bytes(group)
    for _ in range(num_runs):
        run()
    return before - free_bytes(group)


def free_bytes(group: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    dist.barrier(group)
    free = torch.cuda.mem_get_info()[0]
    dist.barrier(group)
    return free
