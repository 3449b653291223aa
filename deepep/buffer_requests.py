"""What `Buffer.dispatch` and `Buffer.combine` are told, checked and stated as requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from deepep.backends.base import CombineRequest, DispatchRequest, Routing
from deepep.errors import InvalidArgument
from deepep.layout import token_in_rank, topk_ranks
from deepep.validate import (
    COMBINE_DTYPES,
    Bounds,
    Payload,
    check_bias,
    check_experts,
    check_rows,
    check_tensor,
    check_topk,
    check_weights,
    describe,
    split_payload,
    values_are_checked,
    whole_number,
)


class Given(NamedTuple):
    """What a caller passes on of `get_dispatch_layout`; shapes as `Buffer.dispatch` says."""

    num_tokens_per_rank: torch.Tensor | None
    num_tokens_per_rdma_rank: torch.Tensor | None
    is_token_in_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor | None


def fresh_request(
    x: torch.Tensor,
    sf: torch.Tensor | None,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    given: Given,
    expert_alignment: int,
    num_worst_tokens: int,
    num_sms: int,
    bounds: Bounds,
) -> DispatchRequest:
    """State a dispatch that finds its own routing.

    Raises:
        InvalidArgument: names the argument.
    """
    op = "dispatch"
    num_tokens, device = x.shape[0], x.device
    num_experts = _num_experts(op, topk_idx, given, bounds.num_ranks, device)
    _check_given(op, given, num_tokens, device, bounds)
    if topk_idx is not None:
        check_topk(op, topk_idx, topk_weights, num_tokens, num_experts, bounds, device)
        if given.is_token_in_rank is not None and values_are_checked(topk_idx, bounds):
            _check_implied(op, topk_idx, given.is_token_in_rank, num_experts, bounds.num_ranks)
    elif topk_weights is not None:
        raise InvalidArgument(f"{op}: topk_weights without topk_idx; pass both or neither")
    expert_alignment = whole_number(op, "expert_alignment", expert_alignment, 1)
    num_worst_tokens = whole_number(op, "num_worst_tokens", num_worst_tokens, 0)
    return DispatchRequest(
        x, sf, topk_idx, topk_weights, num_experts,
        is_token_in_rank=given.is_token_in_rank if topk_idx is None else None,
        num_tokens_per_expert=given.num_tokens_per_expert if topk_idx is None else None,
        expert_alignment=expert_alignment, num_worst_rows=num_worst_tokens or None, num_sms=num_sms,
    )  # fmt: skip


def cached_request(x: Payload, routing: Routing, is_routed_again: bool, num_sms: int) -> DispatchRequest:
    """State a dispatch that repeats `routing`; `is_routed_again` says that the caller names a routing beside it.

    Raises:
        InvalidArgument: names the argument.
    """
    op = "dispatch"
    if is_routed_again:
        raise InvalidArgument(f"{op}: handle repeats a routing; leave out topk_idx, topk_weights, num_worst_tokens")
    dst_rank = routing.dst_rank
    data, sf = split_payload(op, x, dst_rank.shape[0], dst_rank.device)
    return DispatchRequest(data, sf, None, None, routing.num_experts, routing=routing, num_sms=num_sms)


def combine_request(
    x: torch.Tensor,
    routing: Routing,
    topk_weights: torch.Tensor | None,
    bias: torch.Tensor | Sequence[torch.Tensor] | None,
    num_sms: int,
) -> CombineRequest:
    """State a combine of compact rows.

    Raises:
        InvalidArgument: names the argument.
    """
    op = "combine"
    check_rows(op, "x", x, routing.num_recv_tokens, routing.dst_rank.device)
    if x.dtype not in COMBINE_DTYPES:
        raise InvalidArgument(f"{op}: x is {x.dtype}; sums are over bfloat16, float16 or float32")
    if topk_weights is not None:
        check_weights(op, topk_weights, (x.shape[0], _num_topk(routing, topk_weights)), x.device)
    biases = check_bias(op, bias, x, routing.dst_rank.shape[0])
    return CombineRequest(x, routing, topk_weights=topk_weights, bias=biases, num_sms=num_sms)


def _num_experts(op: str, topk_idx: torch.Tensor | None, given: Given, num_ranks: int, device: torch.device) -> int:
    per_expert = given.num_tokens_per_expert
    if per_expert is None or (topk_idx is None and given.is_token_in_rank is None):
        raise InvalidArgument(
            f"{op}: without a handle, num_tokens_per_expert and one of topk_idx and is_token_in_rank are needed; "
            "pass what get_dispatch_layout returned"
        )
    num_experts = per_expert.numel() if isinstance(per_expert, torch.Tensor) else 0
    if num_experts == 0:
        raise InvalidArgument(f"{op}: num_tokens_per_expert is {describe(per_expert)}; it must be an int32 tensor [E]")
    check_experts(op, num_experts, num_ranks)
    check_tensor(op, "num_tokens_per_expert", per_expert, torch.int32, (num_experts,), device)
    return num_experts


def _check_given(op: str, given: Given, num_tokens: int, device: torch.device, bounds: Bounds) -> None:
    num_ranks = bounds.num_ranks
    if given.is_token_in_rank is not None:
        check_tensor(op, "is_token_in_rank", given.is_token_in_rank, torch.bool, (num_tokens, num_ranks), device)
    if given.num_tokens_per_rank is not None:
        check_tensor(op, "num_tokens_per_rank", given.num_tokens_per_rank, torch.int32, (num_ranks,), device)
    if given.num_tokens_per_rdma_rank is not None:
        shape = (bounds.num_scaleout_ranks,)
        check_tensor(op, "num_tokens_per_rdma_rank", given.num_tokens_per_rdma_rank, torch.int32, shape, device)


def _check_implied(
    op: str, topk_idx: torch.Tensor, is_token_in_rank: torch.Tensor, num_experts: int, num_ranks: int
) -> None:
    implied = token_in_rank(topk_ranks(topk_idx, num_experts // num_ranks), num_ranks)
    if not torch.equal(implied, is_token_in_rank):
        raise InvalidArgument(f"{op}: is_token_in_rank does not follow from topk_idx; use get_dispatch_layout")


def _num_topk(routing: Routing, topk_weights: torch.Tensor) -> int:
    """Give the K that weights must have: the dispatch's, or their own where it had none."""
    if routing.topk_idx is not None:
        return routing.topk_idx.shape[1]
    return topk_weights.shape[-1] if isinstance(topk_weights, torch.Tensor) and topk_weights.dim() else 0
