"""One dispatch and combine with a result that is easy to check."""

from __future__ import annotations

from typing import Any

import torch

import deepep


class Step:
    """Tensors of a dispatch and combine whose experts give back what they get, made once for many calls."""

    def __init__(self, buffer: deepep.Buffer, num_ranks: int) -> None:
        num_tokens, num_experts = 64, 4 * num_ranks
        topk_idx = torch.rand(num_tokens, num_experts, device="cuda").topk(4, dim=1).indices
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        self.buffer = buffer
        self.x = torch.randn(num_tokens, 1024, device="cuda").to(torch.bfloat16)
        self.copies = in_rank.sum(dim=1, keepdim=True)
        self.routing: dict[str, Any] = {
            "num_tokens_per_rank": per_rank,
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
            "topk_idx": topk_idx,
        }

    def run(self) -> torch.Tensor:
        """Dispatch and combine; gives [T, H]."""
        recv_x, _, _, _, handle, _ = self.buffer.dispatch(self.x, **self.routing)
        y, _, _ = self.buffer.combine(recv_x, handle)
        return y

    def check(self, y: torch.Tensor) -> None:
        """Wait for a result of `run` and compare it."""
        torch.cuda.synchronize()
        torch.testing.assert_close(y.float(), self.x.float() * self.copies, rtol=2e-2, atol=1e-2)


def step(buffer: deepep.Buffer, num_ranks: int) -> None:
    """Do all of it once."""
    once = Step(buffer, num_ranks)
    once.check(once.run())
