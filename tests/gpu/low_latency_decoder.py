"""A decode step in low latency, and what it has to give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import deepep

MAX_TOKENS, HIDDEN, TOPK = 48, 512, 4


def complete(event: deepep.EventOverlap, hook: Callable[[], None] | None) -> None:
    """Let the current stream go on with what a call gives, however it was called."""
    if hook is not None:
        hook()
    event.current_stream_wait()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


class Decoder:
    """A buffer and the tensors of one decode step, whose experts give back what they get."""

    def __init__(self, group: Any, timeout: float = 5.0, enable_shrink: bool = False) -> None:
        self.rank, self.num_ranks = group.rank(), group.size()
        self.num_experts = 8 * self.num_ranks
        num_bytes = deepep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, self.num_ranks, self.num_experts)
        self.buffer = deepep.Buffer(
            group,
            0,
            num_bytes,
            low_latency_mode=True,
            backend="ipc",
            timeout=timeout,
            enable_shrink=enable_shrink,
            explicitly_destroy=True,
        )
        self.x = torch.empty(MAX_TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.topk_idx = torch.empty(MAX_TOKENS, TOPK, dtype=torch.int64, device="cuda")
        self.topk_weights = torch.empty(MAX_TOKENS, TOPK, device="cuda")
        self.left_out = torch.zeros(MAX_TOKENS, TOPK, dtype=torch.bool, device="cuda")  # of combine only
        self.num_tokens = MAX_TOKENS

    def draw(self, seed: int) -> None:
        """New tokens and routing in place, with some choices missing."""
        generator = torch.Generator().manual_seed(1000 * seed + self.rank)
        self.x.copy_(torch.randn(MAX_TOKENS, HIDDEN, generator=generator))
        scores = torch.rand(MAX_TOKENS, self.num_experts, generator=generator)
        missing = torch.rand(MAX_TOKENS, TOPK, generator=generator) < 0.2
        self.topk_idx.copy_(scores.topk(TOPK, dim=1).indices.masked_fill(missing, -1))
        self.topk_weights.copy_(torch.rand(MAX_TOKENS, TOPK, generator=generator))

    def step(
        self,
        *,
        weights_ahead: bool = False,
        use_hook: bool = False,
        is_async: bool = False,
        reduction: str = "per_rank",
    ) -> torch.Tensor:
        """Dispatch and combine once; returns [T, H]."""
        x, topk_idx, topk_weights = (part[: self.num_tokens] for part in (self.x, self.topk_idx, self.topk_weights))
        rows, _, handle, event, hook = self.buffer.low_latency_dispatch(
            x,
            topk_idx,
            MAX_TOKENS,
            self.num_experts,
            use_fp8=False,
            async_finish=is_async,
            return_recv_hook=use_hook,
            topk_weights=topk_weights if weights_ahead else None,
        )
        complete(event, hook)
        assert isinstance(rows, torch.Tensor)
        if not weights_ahead:
            topk_idx = topk_idx.masked_fill(self.left_out[: self.num_tokens], -1)
        y, event, hook = self.buffer.low_latency_combine(
            rows,
            topk_idx,
            topk_weights,
            handle,
            async_finish=is_async,
            return_recv_hook=use_hook,
            reduction=reduction,
        )
        complete(event, hook)
        return y

    def expected_copies(self) -> torch.Tensor:
        """What `step` gives with the reduction "per_copy", worked out from this rank's tokens alone: [T, H]."""
        counts = (self.topk_idx >= 0) & ~self.left_out
        total = torch.zeros(MAX_TOKENS, HIDDEN, device="cuda")
        for k in range(TOPK):
            total = torch.where(counts[:, k, None], total + self.topk_weights[:, k, None] * self.x.float(), total)
        return total.to(torch.bfloat16)[: self.num_tokens]

    def expected(self, gone: tuple[int, ...] = ()) -> torch.Tensor:
        """What `step` gives, worked out from this rank's tokens alone: [T, H]."""
        owner = self.topk_idx.div(self.num_experts // self.num_ranks, rounding_mode="floor")
        last = torch.full((MAX_TOKENS, self.num_ranks), -1, device="cuda")
        sums = torch.zeros(self.num_ranks, MAX_TOKENS, HIDDEN, device="cuda")
        for k in range(TOPK):
            for rank in range(self.num_ranks):
                here = (owner[:, k] == rank) & (self.topk_idx[:, k] >= 0)
                last[:, rank] = torch.where(here, k, last[:, rank])
                term = self.topk_weights[:, k, None] * self.x.float()
                counts = here & ~self.left_out[:, k]
                sums[rank] = torch.where(counts[:, None], sums[rank] + term, sums[rank])
        rounded, total = sums.to(torch.bfloat16).float(), torch.zeros(MAX_TOKENS, HIDDEN, device="cuda")
        for k in range(TOPK):
            for rank in set(range(self.num_ranks)) - set(gone):
                total = torch.where((last[:, rank] == k)[:, None], total + rounded[rank], total)
        return total.to(torch.bfloat16)[: self.num_tokens]
