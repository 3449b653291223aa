"""Dispatch and combine between local processes that this script starts by itself.

    python examples/spawn.py

Every rank holds 8 tokens and 2 experts; expert number e multiplies by e + 1.
"""

from __future__ import annotations

from typing import Any

import torch

import deepep
from deepep.testing.launch import spawn

NUM_TOKENS, HIDDEN, NUM_TOPK, EXPERTS_PER_RANK = 8, 128, 2, 2


def route_and_return(group: Any, comm: Any = None) -> float:
    """One mixture-of-experts layer on this rank; gives the largest error against the answer worked out by hand."""
    # These tensors are on the CPU. "auto", the default, takes the fastest backend for tensors on GPUs where there are.
    buffer = deepep.Buffer(group, comm=comm, backend="reference")
    rank, num_ranks = buffer.rank, buffer.group_size
    num_experts = EXPERTS_PER_RANK * num_ranks

    # What a model would bring: tokens, the experts each of them chose, and with which weights.
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    topk_weights, topk_idx = torch.rand(NUM_TOKENS, num_experts, generator=generator).topk(NUM_TOPK)

    # 1. Count, then send every token once to each rank that owns one of its experts.
    per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    recv_x, recv_topk_idx, recv_topk_weights, counts, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_host,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
    )
    print(f"rank {rank}: {len(recv_x)} rows arrived, {counts} for my experts", flush=True)

    # 2. Compute: recv_topk_idx says which of my experts want a row (-1: none), recv_topk_weights how much.
    expert = recv_topk_idx + rank * EXPERTS_PER_RANK
    factor = torch.where(recv_topk_idx >= 0, (expert + 1) * recv_topk_weights, 0.0).sum(dim=1)
    # 3. Bring the results home, where those of one token are added up.
    y, _, _ = buffer.combine(recv_x * factor.unsqueeze(1), handle)

    expected = x * ((topk_idx + 1) * topk_weights).sum(dim=1, keepdim=True)
    buffer.destroy()
    return float((y - expected).abs().max())


if __name__ == "__main__":
    errors = spawn(route_and_return, 4)
    print(f"largest error on any rank: {max(errors):.1e}")
