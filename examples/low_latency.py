"""Decoding: a few tokens per rank and step, fixed shapes, FP8 on the way there, nothing waits on the CPU for counts.

    python examples/low_latency.py

Rows arrive per local expert ("padded"): recv_x[e, :count[e]] are the tokens of expert e.
"""

from __future__ import annotations

from typing import Any

import torch

import deepep
from deepep.quant import fp8_uncast
from deepep.testing.launch import spawn

MAX_TOKENS, HIDDEN, NUM_TOPK, EXPERTS_PER_RANK, NUM_STEPS = 16, 512, 2, 2, 3


def decode(group: Any) -> float:
    """Some decoding steps; gives the largest error relative to the largest value."""
    num_experts = EXPERTS_PER_RANK * group.size()
    size = deepep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, group.size(), num_experts)
    # These tensors are on the CPU. "auto", the default, takes the fastest backend for tensors on GPUs where there are.
    buffer = deepep.Buffer(group, num_rdma_bytes=size, low_latency_mode=True, backend="reference")
    generator = torch.Generator().manual_seed(buffer.rank)
    worst = 0.0
    for _ in range(NUM_STEPS):
        # Ranks may hold different numbers of tokens in each step, none included.
        num_tokens = int(torch.randint(MAX_TOKENS + 1, (1,), generator=generator))
        x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
        topk_weights, topk_idx = torch.rand(num_tokens, num_experts, generator=generator).topk(NUM_TOPK)

        # With a hook the call returns at once; whatever is computed before hook() overlaps with the transfer.
        (recv_x, sf), count, handle, _, hook = buffer.low_latency_dispatch(
            x, topk_idx, MAX_TOKENS, num_experts, return_recv_hook=True
        )
        if hook is not None:
            hook()

        # Experts: here number e multiplies by e + 1. Rows past count[e] hold nothing and are never read.
        first = buffer.rank * EXPERTS_PER_RANK
        factors = torch.arange(first + 1, first + EXPERTS_PER_RANK + 1).view(-1, 1, 1)
        out = (fp8_uncast(recv_x, sf) * factors).bfloat16()
        y, _, _ = buffer.low_latency_combine(out, topk_idx, topk_weights, handle)

        expected = x.float() * ((topk_idx + 1) * topk_weights).sum(dim=1, keepdim=True)
        if num_tokens:
            worst = max(worst, float((y - expected).abs().max() / expected.abs().max()))
        print(f"rank {buffer.rank}: sent {num_tokens} tokens, got {count.tolist()} for my experts", flush=True)
    buffer.destroy()
    return worst


if __name__ == "__main__":
    errors = spawn(decode, 4)
    print(f"largest relative error on any rank: {max(errors):.3f} (FP8 has 4 significant bits)")
