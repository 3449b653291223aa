"""Dispatch and combine that gradients flow through: the backward of each is the other, along the same routing.

Plain `torch.autograd.Function`s over `Buffer`; no torch operator is registered. Both directions are collective: every
rank must run the backward pass that the others run, also one that received no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepep.buffer import Buffer
from deepep.config import Config
from deepep.errors import InvalidArgument
from deepep.handle import NormalHandle

Dispatched = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[int], NormalHandle]


@dataclass(frozen=True)
class _Plan:
    """What a dispatch is told beside its tensors."""

    buffer: Buffer
    num_experts: int
    expert_alignment: int
    num_worst_tokens: int
    config: Config | None


def dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    num_experts: int,
    *,
    expert_alignment: int = 1,
    num_worst_tokens: int = 0,
    config: Config | None = None,
) -> Dispatched:
    """Send every token once to each rank that owns one of its experts; differentiable in `x` and `topk_weights`.

    Args:
        buffer: the same group on every rank; it must outlive the backward pass.
        x: [T, H] bf16, fp16 or fp32.
        topk_idx: [T, K] int64, -1 = no expert.
        topk_weights: [T, K] float32, or None.
        num_experts: E.
        expert_alignment: each count of the returned list is rounded up to it.
        num_worst_tokens: give exactly so many rows without waiting for counts on the CPU; rows that nothing arrived
            for are zero here, so that they add nothing to the gradients of what reads them.
        config: `num_sms` of it bounds the multiprocessors used, backward too.

    Returns:
        `recv_x` [N, H], `recv_topk_idx` [N, K], `recv_topk_weights` [N, K] or None, aligned counts of the local
        experts (`[]` with `num_worst_tokens`), and the handle for `combine`. Errors as in `Buffer.dispatch`.
    """
    with buffer._checking("dispatch"):
        if not isinstance(x, torch.Tensor):
            raise InvalidArgument(
                f"dispatch: x is a {type(x).__name__}; gradients flow through one tensor without sf only"
            )
    plan = _Plan(buffer, num_experts, expert_alignment, num_worst_tokens, config)
    return _Dispatch.apply(x, topk_weights, topk_idx, plan)


def combine(
    buffer: Buffer,
    x: torch.Tensor,
    handle: NormalHandle,
    *,
    bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Bring every row home and add up, unweighted, what the ranks return; differentiable in `x` and `bias`.

    Args:
        buffer: that dispatched.
        x: [N, H] bf16, fp16 or fp32, rows as dispatch laid them out.
        handle: of that dispatch.
        bias: none, one or two [T, H] that the sum starts from.
        config: `num_sms` of it bounds the multiprocessors used, backward too.

    Returns:
        [T, H]. Errors as in `Buffer.combine`.
    """
    with buffer._checking("combine"):
        biases = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
        if not isinstance(x, torch.Tensor):
            raise InvalidArgument(f"combine: x is a {type(x).__name__}; it must be a tensor [N, H]")
    return _Combine.apply(x, buffer, handle, config, *biases)


class _Dispatch(torch.autograd.Function):
    """Forward: dispatch. Backward: combine, with the gradients of the weights travelling beside the rows."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, topk_weights: torch.Tensor | None, topk_idx: torch.Tensor, plan: _Plan
    ) -> tuple[Any, ...]:
        with plan.buffer._checking("dispatch"):
            layout = plan.buffer.get_dispatch_layout(topk_idx, plan.num_experts)
        per_rank, per_host, per_expert, in_rank, _ = layout
        recv_x, recv_topk_idx, recv_topk_weights, counts, handle, _ = plan.buffer.dispatch(
            x.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_host,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            expert_alignment=plan.expert_alignment,
            num_worst_tokens=plan.num_worst_tokens,
            config=plan.config,
        )
        ctx.plan, ctx.handle = plan, handle
        ctx.mark_non_differentiable(recv_topk_idx)
        ctx.save_for_backward(recv_topk_idx)
        return _without_tail(recv_x, handle), recv_topk_idx, recv_topk_weights, counts, handle

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: torch.Tensor, _idx: Any, grad_weights: torch.Tensor | None, *_rest: Any) -> Any:
        (recv_topk_idx,) = ctx.saved_tensors
        if grad_weights is not None:
            # Elsewhere the weight is a constant 0 here, whatever the input was.
            grad_weights = grad_weights.masked_fill(recv_topk_idx < 0, 0.0)
        home, weights, _ = ctx.plan.buffer.combine(
            grad_x.contiguous(), ctx.handle, topk_weights=grad_weights, config=ctx.plan.config
        )
        return home, weights, None, None


class _Combine(torch.autograd.Function):
    """Forward: combine. Backward: the dispatch repeated, with the gradients as tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        buffer: Buffer,
        handle: NormalHandle,
        config: Config | None,
        *biases: torch.Tensor,
    ) -> torch.Tensor:
        ctx.buffer, ctx.handle, ctx.config, ctx.num_biases = buffer, handle, config, len(biases)
        return buffer.combine(x.contiguous(), handle, bias=biases or None, config=config)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        rows = ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle, config=ctx.config)[0]
        return _without_tail(rows, ctx.handle), None, None, None, *[grad] * ctx.num_biases


def _without_tail(rows: torch.Tensor, handle: NormalHandle) -> torch.Tensor:
    """Zero the rows that nothing arrived for (worst-case shapes); what lies there may be NaN."""
    if handle.has_tail:
        rows.masked_fill_((handle.routing.recv_src_token < 0).unsqueeze(1), 0)
    return rows
