"""One dispatch and combine with a result that is easy to check."""

from __future__ import annotations

import torch

import deepep


def step(buffer: deepep.Buffer, num_ranks: int) -> None:
    num_tokens, num_experts = 64, 4 * num_ranks
    topk_idx = torch.rand(num_tokens, num_experts, device="cuda").topk(4, dim=1).indices
    x = torch.randn(num_tokens, 1024, device="cuda").to(torch.bfloat16)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    recv_x, _, _, _, handle, _ = buffer.dispatch(
        x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=topk_idx
    )
    assert isinstance(recv_x, torch.Tensor)
    assert handle is not None
    y, _, _ = buffer.combine(recv_x, handle)
    copies = in_rank.sum(dim=1, keepdim=True)
    torch.cuda.synchronize()
    torch.testing.assert_close(y.float(), x.float() * copies, rtol=2e-2, atol=1e-2)
