"""`DEEPEP_DEBUG=1`: an expert that does not exist gets an error with a name."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import deepep
from deepep.testing.launch import spawn

BAD = 99


@pytest.mark.parametrize("low_latency", [False, True], ids=["normal", "low latency"])
def test_an_expert_out_of_range_gets_an_error_with_a_name(low_latency: bool) -> None:
    texts = spawn(dispatch_to_nowhere, 2, low_latency, device="cuda", timeout=100)
    assert str(BAD) in texts[0]
    assert "dispatch" in texts[0]


def dispatch_to_nowhere(group: Any, low_latency: bool) -> str:
    """Rank 0 asks for an expert that does not exist; gives the error it gets."""
    os.environ["DEEPEP_DEBUG"] = "1"  # before kernels are compiled
    num_tokens, num_experts, hidden = 16, 8, 512
    x = torch.randn(num_tokens, hidden, device="cuda").to(torch.bfloat16)
    topk_idx = torch.rand(num_tokens, num_experts, device="cuda").topk(4, dim=1).indices
    size = deepep.Buffer.get_low_latency_rdma_size_hint(num_tokens, hidden, 2, num_experts)
    buffer = deepep.Buffer(
        group, 8 << 20, size if low_latency else 0, low_latency_mode=low_latency, backend="ipc", timeout=5.0
    )

    def dispatch() -> None:
        if low_latency:
            buffer.low_latency_dispatch(x, topk_idx, num_tokens, num_experts)
        else:
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
            buffer.dispatch(
                x,
                topk_idx=topk_idx,
                num_tokens_per_rank=per_rank,
                num_tokens_per_expert=per_expert,
                is_token_in_rank=in_rank,
            )
        torch.cuda.synchronize()

    dispatch()
    if group.rank() == 0:
        topk_idx[3, 1] = BAD
    try:
        dispatch()
        dispatch()  # without a wait for counts only the next call can tell
    except deepep.DeepEPError as error:
        return str(error)
    return "no error"
