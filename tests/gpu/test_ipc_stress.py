"""A thousand steps of changing shapes and routing, with poison in the windows and delays on random ranks."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deepep
from deepep.testing.launch import Workers

NUM_STEPS = int(os.environ.get("DEEPEP_TEST_STEPS", "1000"))
NUM_RANKS = 4
POISON_EVERY = 5


@pytest.mark.timeout(870)
def test_a_thousand_random_steps_equal_the_reference_and_repeat() -> None:
    with Workers(NUM_RANKS, device="cuda") as workers:
        first = workers.run(stress, NUM_STEPS, 1, True, timeout=550)
        again = workers.run(stress, NUM_STEPS // 5, 1, False, timeout=300)
    for rank in range(NUM_RANKS):
        assert first[rank][: len(again[rank])] == again[rank], f"rank {rank}: a rerun gave other bits"


def stress(group: Any, num_steps: int, seed: int, compare: bool) -> list[int]:
    """Run the steps; returns a hash of every result. Compares each fifth step with the reference backend."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    buffer = deepep.Buffer(group, backend="ipc", timeout=20)
    reference = deepep.Buffer(group, backend="reference", timeout=20)
    shared, own = random.Random(seed), random.Random(seed * 1000 + rank)
    hashes = []
    for step in range(num_steps):
        hidden = 8 * shared.randint(1, 300)
        num_topk, num_local = shared.randint(1, 9), shared.randint(3, 16)
        most = shared.choice([1, 16, 200])
        inputs = make_inputs(own, own.randint(0, most), hidden, min(num_topk, num_local), num_local * num_ranks)
        if step % POISON_EVERY == 0:
            poison(buffer, group)
        results = round_trip(buffer, inputs, own)
        if compare and step % POISON_EVERY == 0:
            expected = round_trip(reference, inputs, None)
            for name, value, wanted in zip(
                ("x", "topk_idx", "weights", "y", "y weights"), results, expected, strict=True
            ):
                assert torch.equal(as_bits(value), as_bits(wanted)), f"step {step}, rank {rank}: {name} differs"
        hashes.append(hash(tuple(int(as_bits(value).long().sum()) for value in results)))
    buffer.destroy()
    return hashes


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]


def make_inputs(source: random.Random, num_tokens: int, hidden: int, num_topk: int, num_experts: int) -> Inputs:
    generator = torch.Generator().manual_seed(source.getrandbits(40))
    x = torch.randn(num_tokens, hidden, generator=generator).to(torch.bfloat16)
    topk_idx = torch.rand(num_tokens, num_experts, generator=generator).topk(num_topk, dim=1).indices
    topk_idx[torch.rand(topk_idx.shape, generator=generator) < source.choice([0.0, 0.3, 1.0])] = -1
    weights = torch.rand(num_tokens, num_topk, generator=generator)
    return x.cuda(), topk_idx.cuda(), weights.cuda(), num_experts


def round_trip(buffer: deepep.Buffer, inputs: Inputs, delays: random.Random | None) -> tuple[torch.Tensor, ...]:
    x, topk_idx, weights, num_experts = inputs
    per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    delay(delays)
    recv_x, recv_topk_idx, recv_weights, _, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_host,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=weights,
    )
    delay(delays)
    y, y_weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    assert recv_topk_idx is not None
    assert recv_weights is not None
    assert y_weights is not None
    assert isinstance(recv_x, torch.Tensor)
    return recv_x, recv_topk_idx, recv_weights, y, y_weights


def delay(source: random.Random | None) -> None:
    """Hold up the GPU, the host, or neither."""
    if source is None:
        return
    kind = source.random()
    if kind < 0.1:
        torch.cuda._sleep(source.randint(1, 2_000_000))
    elif kind < 0.15:
        time.sleep(source.random() * 0.003)


def poison(buffer: deepep.Buffer, group: Any) -> None:
    """Fill the window and the allocator's free memory with NaN while nobody is using them."""
    torch.cuda.synchronize()
    dist.barrier(group)
    buffer.get_local_buffer_tensor(torch.uint8).fill_(0xFF)
    filler = torch.empty(64 << 20, dtype=torch.uint8, device="cuda").fill_(0xFF)
    del filler
    torch.cuda.synchronize()
    dist.barrier(group)


def as_bits(value: torch.Tensor) -> torch.Tensor:
    # Where nothing or one element lies, the last stride may be anything, and `view` wants 1.
    return value.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
