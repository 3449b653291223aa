"""Routing maths in plain torch: who gets which token, and in which row it lands (CONTRACT, 'Three row layouts').

A row's place is decided here and nowhere else in the Python code: `dst_rows` at the source, `expanded_rows` at the
receiver. Everything follows from one order: ascending (source rank, source token).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class DispatchLayout(NamedTuple):
    """How many tokens go where: the result of `Buffer.get_dispatch_layout` without its event."""

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


def align(value: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`."""
    return -(-value // alignment) * alignment


def num_expanded_rows_at_most(num_tokens: int, num_topk: int, num_local_experts: int, alignment: int) -> int:
    """Rows an expanded result has at most, `num_tokens` being the most compact rows (CONTRACT, 'ElasticBuffer')."""
    return align(num_tokens * min(num_topk, num_local_experts) + (alignment - 1) * num_local_experts, alignment)


def topk_ranks(topk_idx: torch.Tensor, num_local_experts: int) -> torch.Tensor:
    """Give the rank that owns each chosen expert, [T, K] int64; -1 where no expert is chosen."""
    return torch.where(topk_idx >= 0, topk_idx // num_local_experts, -1)


def token_in_rank(ranks: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Say which ranks each token goes to, [T, R] bool, from the [T, K] ranks of its choices."""
    # Column R catches the empty slots and is cut off.
    hit = torch.zeros(ranks.shape[0], num_ranks + 1, dtype=torch.bool, device=ranks.device)
    hit.scatter_(1, torch.where(ranks >= 0, ranks, num_ranks), True)
    return hit[:, :num_ranks].contiguous()


def dispatch_layout(
    topk_idx: torch.Tensor, num_experts: int, num_ranks: int, num_ranks_per_host: int | None = None
) -> DispatchLayout:
    """Count tokens per rank, per host and per expert.

    Args:
        topk_idx: [T, K] int64, -1 = no expert.
        num_experts: E, a multiple of `num_ranks`.
        num_ranks: R.
        num_ranks_per_host: ranks of one scale-up domain; None or R for a single one.

    Returns:
        int32 [R], int32 [R / num_ranks_per_host] or None, int32 [E], bool [T, R]; a token counts once per rank.
    """
    in_rank = token_in_rank(topk_ranks(topk_idx, num_experts // num_ranks), num_ranks)
    chosen = topk_idx[topk_idx >= 0]
    per_expert = torch.bincount(chosen, minlength=num_experts).to(torch.int32)
    per_host = None
    if num_ranks_per_host is not None and num_ranks_per_host < num_ranks:
        in_host = in_rank.view(in_rank.shape[0], num_ranks // num_ranks_per_host, num_ranks_per_host).any(dim=2)
        per_host = in_host.sum(dim=0, dtype=torch.int32)
    return DispatchLayout(in_rank.sum(dim=0, dtype=torch.int32), per_host, per_expert, in_rank)


def last_slots(ranks: torch.Tensor) -> torch.Tensor:
    """Keep each rank only at the highest slot of the token that names it; -1 elsewhere. [T, S] in, [T, S] out."""
    num_slots = ranks.shape[1]
    same = ranks.unsqueeze(2) == ranks.unsqueeze(1)
    later = torch.ones(num_slots, num_slots, dtype=torch.bool, device=ranks.device).triu(1)
    return torch.where((same & later).any(dim=2), -1, ranks)


def slot_positions(dst_rank: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Number the rows each rank gets from this source, in token order: [T, S] int64, -1 in empty slots."""
    in_rank = token_in_rank(dst_rank, num_ranks)
    position = in_rank.to(torch.int64).cumsum(dim=0) - 1
    return torch.where(dst_rank >= 0, position.gather(1, dst_rank.clamp(min=0)), -1)


def dst_rows(dst_rank: torch.Tensor, first_row: torch.Tensor) -> torch.Tensor:
    """Give the compact row at the destination for each slot.

    Args:
        dst_rank: [T, S] int64 destination ranks, -1 in empty slots.
        first_row: [R] int64, where this source's rows start at each rank.

    Returns:
        [T, S] int32, -1 in empty slots.
    """
    position = slot_positions(dst_rank, first_row.numel())
    return torch.where(dst_rank >= 0, position + first_row[dst_rank.clamp(min=0)], -1).to(torch.int32)


def localise(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, rank: int, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turn global expert numbers into this rank's own: -1 and weight 0 where the choice lives elsewhere."""
    local = topk_idx - rank * num_local_experts
    here = (local >= 0) & (local < num_local_experts) & (topk_idx >= 0)
    return torch.where(here, local, -1), None if topk_weights is None else torch.where(here, topk_weights, 0.0)


def count_experts(local_idx: torch.Tensor, num_local_experts: int) -> torch.Tensor:
    """Count the tokens of each local expert, [L] int32, from [N, K] local expert numbers."""
    return torch.bincount(local_idx[local_idx >= 0], minlength=num_local_experts).to(torch.int32)


def expanded_rows(local_idx: torch.Tensor, first_row: torch.Tensor) -> torch.Tensor:
    """Give every (compact row, top-k position) its row in the expanded or padded layout.

    Args:
        local_idx: [N, K] int64 local expert numbers in compact order, -1 elsewhere.
        first_row: [L] int64, where each expert's rows start.

    Returns:
        [N, K] int32; inside an expert rows follow the compact order; -1 where there is none.
    """
    flat = local_idx.flatten()
    order = torch.argsort(flat, stable=True)
    expert = flat[order]
    group_start = torch.searchsorted(expert, torch.arange(first_row.numel(), device=flat.device))
    safe = expert.clamp(min=0)
    row = torch.arange(flat.numel(), device=flat.device) - group_start[safe] + first_row[safe]
    out = torch.empty_like(flat)
    out[order] = torch.where(expert >= 0, row, -1)
    return out.view_as(local_idx).to(torch.int32)
