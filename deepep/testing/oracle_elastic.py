"""What every rank must get from `ElasticBuffer`; see `oracle`. Compact rows are those of `oracle.expected_compact`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepep.testing.oracle import (
    Route,
    add_terms,
    align,
    bits,
    gather_tokens,
    int32,
    rank_terms,
    reduce_hosts,
    round_sum,
)
from deepep.testing.routing import Inputs


@dataclass(frozen=True)
class ExpandedRows:
    """What one rank receives in the expanded layout, with exact shapes; padding rows are zero.

    Attributes:
        x: [rows, H]; sf: [rows, S] or None; topk_weights: [rows].
        is_padding: [rows] bool, rows between experts that hold no token.
        counts: aligned rows of each local expert, Python ints.
        expanded_row: [N, K] int32, row of each top-k position of a compact row, -1 where it lives elsewhere.
    """

    x: torch.Tensor
    sf: torch.Tensor | None
    topk_weights: torch.Tensor
    is_padding: torch.Tensor
    counts: list[int]
    expanded_row: torch.Tensor


@dataclass(frozen=True)
class HandleFields:
    """Fields of an `EPHandle` that follow from routing; names and shapes as CONTRACT, '`ElasticBuffer`', has them.

    `src_token_global_idx` is column 0 of `recv_src_metadata`.
    """

    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    psum_num_recv_tokens_per_expert: torch.Tensor
    num_unaligned_recv_tokens_per_expert: torch.Tensor
    num_recv_tokens_per_expert_list: list[int]
    src_token_global_idx: torch.Tensor
    dst_buffer_slot_idx: torch.Tensor


def expected_expanded(route: Route, inputs: Sequence[Inputs], rank: int, expert_alignment: int = 1) -> ExpandedRows:
    """Work out the expanded rows of `rank`: by expert, inside an expert by (source rank, source token)."""
    starts, counts = _expert_blocks(route, rank, expert_alignment)
    x, sf = gather_tokens(inputs, [])
    blocks, sf_blocks = [x], [] if sf is None else [sf]
    weights, is_padding = torch.zeros(sum(counts)), torch.ones(sum(counts), dtype=torch.bool)
    for expert, start, count in zip(route.local_experts(rank), starts, counts, strict=True):
        copies = route.copies[expert]
        rows, row_sf = gather_tokens(inputs, [(src, token) for src, token, _ in copies])
        blocks += [rows, _zero_rows(rows, count - len(copies))]
        if row_sf is not None:
            sf_blocks += [row_sf, _zero_rows(row_sf, count - len(copies))]
        for place, (src, token, k) in enumerate(copies):
            weights[start + place] = inputs[src].topk_weights[token, k]
            is_padding[start + place] = False
    first_local = route.local_experts(rank).start
    expanded_row = torch.full((len(route.rows[rank]), route.num_topk), -1, dtype=torch.int32)
    for row, (src, token) in enumerate(route.rows[rank]):
        for k, expert in enumerate(route.choices[src][token]):
            if expert in route.local_experts(rank):
                expanded_row[row, k] = starts[expert - first_local] + route.place_of[src, token, k]
    return ExpandedRows(_cat(blocks), _cat(sf_blocks) if sf_blocks else None, weights, is_padding, counts, expanded_row)


def expected_handle(
    route: Route,
    rank: int,
    num_max_tokens_per_rank: int,
    *,
    expert_alignment: int = 1,
    do_expand: bool = False,
    num_scaleup_ranks: int = 0,
) -> HandleFields:
    """Work out the handle of `rank`'s dispatch; `num_scaleup_ranks` 0 for one domain that holds all ranks."""
    num_scaleup_ranks = num_scaleup_ranks or route.num_ranks
    real = [len(route.copies[expert]) for expert in route.local_experts(rank)]
    starts, counts = _expert_blocks(route, rank, expert_alignment)
    ends = [start + (real[e] if do_expand else counts[e]) for e, start in enumerate(starts)]
    sources = [src % num_scaleup_ranks for src, _ in route.rows[rank]]
    slots = torch.full((len(route.choices[rank]), route.num_topk), -1, dtype=torch.int32)
    for token in range(len(route.choices[rank])):
        for dst, k in route.last_position(rank, token).items():
            slots[token, k] = route.row_of[dst, rank, token]
    return HandleFields(
        int32([sum(1 for src in sources if src <= scaleup) for scaleup in range(num_scaleup_ranks)]),
        int32(ends),
        int32(real),
        counts,
        int32([src * num_max_tokens_per_rank + token for src, token in route.rows[rank]]),
        slots,
    )


def worst_case_rows(route: Route, num_max_tokens_per_rank: int, expert_alignment: int = 1) -> int:
    """Count the expanded rows that a dispatch without CPU sync allocates."""
    num_rows = route.num_ranks * num_max_tokens_per_rank * min(route.num_topk, route.num_local_experts)
    return align(num_rows + (expert_alignment - 1) * route.num_local_experts, expert_alignment)


def expected_expanded_combine(
    route: Route,
    outputs: Sequence[torch.Tensor],
    rank: int,
    *,
    expert_alignment: int = 1,
    allow_multiple_reduction: bool = True,
    bias: Sequence[torch.Tensor] = (),
    ranks_per_host: int = 0,
) -> torch.Tensor:
    """Sum the expanded rows `outputs[dst]` [rows, H] for the tokens of `rank`: [T, H].

    With `allow_multiple_reduction` the rows of one token on one rank are summed in ascending top-k position and rounded
    first (then those of one host, where `ranks_per_host` leaves several); without it all rows are added once, in
    ascending position.
    """
    is_two_level = 0 < ranks_per_host < route.num_ranks
    terms = []
    starts = _first_rows(route, expert_alignment)
    for token, ranks in enumerate(rank_terms(route, rank)):
        copies = [
            (route.owner(expert), outputs[route.owner(expert)][starts[expert] + route.place_of[rank, token, k]])
            for k, expert in enumerate(route.choices[rank][token])
            if expert >= 0
        ]
        if not allow_multiple_reduction:
            terms.append([row for _, row in copies])
            continue
        sums = [(dst, round_sum([row for owner, row in copies if owner == dst])) for dst in ranks]
        terms.append(reduce_hosts(sums, ranks_per_host) if is_two_level else [row for _, row in sums])
    return add_terms(terms, outputs[0], bias)


def expected_expanded_weights(
    route: Route, weights: Sequence[torch.Tensor], rank: int, expert_alignment: int = 1
) -> torch.Tensor:
    """Take each slot's weight from its expanded row in `weights[dst]` [rows], 0 for empty slots: [T, K]."""
    starts = _first_rows(route, expert_alignment)
    combined = torch.zeros(len(route.choices[rank]), route.num_topk)
    for token, choice in enumerate(route.choices[rank]):
        for k, expert in enumerate(choice):
            if expert >= 0:
                combined[token, k] = weights[route.owner(expert)][starts[expert] + route.place_of[rank, token, k]]
    return combined


def _first_rows(route: Route, expert_alignment: int) -> list[int]:
    """Find the first row of every expert, at the rank that owns it."""
    return [start for rank in range(route.num_ranks) for start in _expert_blocks(route, rank, expert_alignment)[0]]


def _expert_blocks(route: Route, rank: int, expert_alignment: int) -> tuple[list[int], list[int]]:
    """Find the first row and the aligned number of rows of each local expert."""
    counts = [align(len(route.copies[expert]), expert_alignment) for expert in route.local_experts(rank)]
    return [sum(counts[:e]) for e in range(len(counts))], counts


def _zero_rows(like: torch.Tensor, num_rows: int) -> torch.Tensor:
    return torch.zeros(num_rows, *like.shape[1:], dtype=like.dtype)


def _cat(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([bits(block) for block in blocks]).view(blocks[0].dtype)
