"""What `ElasticBuffer.dispatch` is told, checked and turned into the terms of a `DispatchRequest`.

Terms are keyword arguments: a request is made of them once, on the stream of the operation, where what is still missing
is worked out. Making frozen requests out of each other would cost the host a third of the time a call has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from deepep.backends.base import Layout, Routing
from deepep.elastic_handle import EPHandle
from deepep.errors import InvalidArgument
from deepep.layout import num_expanded_rows_at_most
from deepep.validate import Bounds, check_experts, check_rows, check_topk, check_weights, check_written, whole_number


class Named(NamedTuple):
    """What a caller may name and a handle holds; None where it was left out."""

    num_experts: int | None
    num_max_tokens_per_rank: int | None
    expert_alignment: int | None
    do_expand: bool | None


def fresh_terms(
    x: torch.Tensor,
    sf: torch.Tensor | None,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    stats: torch.Tensor | None,
    named: Named,
    do_cpu_sync: bool,
    default_max_tokens: int,
    bounds: Bounds,
) -> dict[str, Any]:
    """State a dispatch that finds its own routing; M is `default_max_tokens` where the caller names none.

    Raises:
        InvalidArgument: names the argument.
    """
    op = "dispatch"
    if topk_idx is None or named.num_experts is None:
        raise InvalidArgument(f"{op}: topk_idx and num_experts are needed without a handle")
    alignment = 1 if named.expert_alignment is None else named.expert_alignment
    max_tokens = named.num_max_tokens_per_rank
    if max_tokens is None:
        max_tokens = default_max_tokens
    num_tokens, device = x.shape[0], x.device
    num_experts = check_experts(op, named.num_experts, bounds.num_ranks)
    check_topk(op, topk_idx, topk_weights, num_tokens, num_experts, bounds, device)
    alignment = whole_number(op, "expert_alignment", alignment, 1)
    max_tokens = whole_number(op, "num_max_tokens_per_rank", max_tokens, 0)
    if max_tokens < max(num_tokens, 1):
        raise InvalidArgument(
            f"{op}: num_max_tokens_per_rank is {max_tokens} and x has {num_tokens} tokens; it must be at least 1 and "
            "at least the tokens of any rank, given here or to the constructor"
        )
    num_local = num_experts // bounds.num_ranks
    if stats is not None:
        check_written(op, "cumulative_local_expert_recv_stats", stats, torch.int32, (num_local,), device)
    num_worst = None
    if not do_cpu_sync:
        num_worst = bounds.num_ranks * max_tokens
        if named.do_expand:
            num_worst = num_expanded_rows_at_most(num_worst, topk_idx.shape[1], num_local, alignment)
    return {
        "x": x,
        "sf": sf,
        "topk_idx": topk_idx,
        "topk_weights": topk_weights,
        "num_experts": num_experts,
        "num_max_tokens_per_rank": max_tokens,
        "layout": Layout.EXPANDED if named.do_expand else Layout.COMPACT,
        "expert_alignment": alignment,
        "num_worst_rows": num_worst,
        "cumulative_local_expert_recv_stats": stats,
    }


def cached_terms(
    x: torch.Tensor,
    sf: torch.Tensor | None,
    handle: EPHandle,
    routing: Routing | None,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    named: Named,
    do_cpu_sync: bool | None,
) -> dict[str, Any]:
    """State a dispatch that repeats the routing of `handle`; `routing` is that, where it is known already.

    Raises:
        InvalidArgument: names the argument that does not go with the handle.
    """
    op = "dispatch"
    if topk_idx is not None or do_cpu_sync:
        raise InvalidArgument(f"{op}: handle repeats a routing; leave out topk_idx and do_cpu_sync")
    for name, value in zip(named._fields, named, strict=True):
        if value is not None and value != getattr(handle, name):
            raise InvalidArgument(
                f"{op}: {name} is {value} and the handle's is {getattr(handle, name)}; leave it out, or pass the same"
            )
    shape, device = handle.topk_idx.shape, handle.topk_idx.device
    check_rows(op, "x", x, shape[0], device)
    if topk_weights is not None:
        check_weights(op, topk_weights, shape, device)
    return {
        "x": x,
        "sf": sf,
        "topk_idx": handle.topk_idx,
        "topk_weights": topk_weights,
        "num_experts": handle.num_experts,
        "num_max_tokens_per_rank": handle.num_max_tokens_per_rank,
        "layout": Layout.EXPANDED if handle.do_expand else Layout.COMPACT,
        "expert_alignment": handle.expert_alignment,
        "routing": routing,
    }
