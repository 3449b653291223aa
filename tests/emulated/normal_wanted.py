"""What every rank's calls in normal mode have to give, from the inputs of all ranks alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from deepep import quant
from deepep.backends.base import CombineResult, DispatchResult, Layout, Reduction, Routing
from deepep.quant import SfFormat
from deepep.testing.oracle import expected_combine, expected_combined_weights, expected_compact, make_route
from deepep.testing.oracle_elastic import (
    expected_expanded,
    expected_expanded_combine,
    expected_expanded_weights,
    expected_handle,
)
from deepep.testing.routing import Case, Inputs, make_all_inputs, make_bias, make_outputs
from deepep.testing.target import Findings, pick, poisoned, scattered


@dataclass(frozen=True)
class Way:
    """How a dispatch and what follows it are asked for.

    Attributes:
        layout: of the received rows.
        is_exact: the host waits for counts; else it allocates for the worst.
        has_topk: tokens name experts; else they name ranks.
        sf_format: of a cast on the way.
        is_zeroed: rows between experts are.
        reduction: of combine.
        has_weights: combine brings weights home.
        num_biases: that combine's sums begin with.
    """

    layout: Layout = Layout.COMPACT
    is_exact: bool = True
    has_topk: bool = True
    sf_format: SfFormat | None = None
    is_zeroed: bool = False
    reduction: Reduction = Reduction.PER_RANK
    has_weights: bool = False
    num_biases: int = 0

    @property
    def is_expanded(self) -> bool:
        return self.layout is Layout.EXPANDED


class Wanted:
    """What the oracle says of a case.

    Args:
        case: what is sent.
        way: how.
    """

    def __init__(self, case: Case, way: Way) -> None:
        self.case, self.way, self.ranks = case, way, range(case.num_ranks)
        self.inputs = make_all_inputs(case)
        self.route = make_route(self.inputs, case.num_experts)
        sent = [_cast(one, way.sf_format) for one in self.inputs]
        self._compact = [expected_compact(self.route, sent, rank, case.expert_alignment) for rank in self.ranks]
        self._expanded = [expected_expanded(self.route, sent, rank, case.expert_alignment) for rank in self.ranks]
        rows = [one.topk_weights for one in (self._expanded if way.is_expanded else self._compact)]
        self._outputs = [make_outputs(case, rank, len(one)) for rank, one in enumerate(rows)]
        # Halves of small numbers: no order of adding them matters.
        self._weights = [torch.arange(one.numel()).view(one.shape) + 0.5 for one in rows]

    def outputs(self, rank: int, routing: Routing) -> torch.Tensor:
        """Rows that a rank hands to combine; those that hold no token are NaN."""
        return self._filled(self._outputs[rank], rank, routing)

    def weights(self, rank: int, routing: Routing) -> torch.Tensor:
        """Weights beside them, likewise."""
        return self._filled(self._weights[rank], rank, routing)

    def biases(self, rank: int) -> tuple[torch.Tensor, ...]:
        """What a rank's sums begin with."""
        return tuple(make_bias(self.case, rank, number) for number in range(self.way.num_biases))

    def _filled(self, rows: torch.Tensor, rank: int, routing: Routing) -> torch.Tensor:
        if self.way.is_expanded:
            return scattered(rows, ~self._expanded[rank].is_padding, routing.num_rows)
        return poisoned(rows, routing.num_rows)

    def check_dispatch(self, rank: int, got: DispatchResult, is_cached: bool = False) -> None:
        """Compare what a rank received with the oracle, bit for bit."""
        found = Findings(rank)
        if not is_cached:
            self._compare_routing(found, rank, got)
        if self.way.is_expanded:
            self._compare_expanded(found, rank, got, is_cached)
        else:
            self._compare_compact(found, rank, got, is_cached)
        found.finish()

    def _compare_routing(self, found: Findings, rank: int, got: DispatchResult) -> None:
        case, routing, rows = self.case, got.routing, self._compact[rank]
        most, alignment = case.num_max_tokens_per_rank, case.expert_alignment
        wanted = expected_handle(self.route, rank, most, expert_alignment=alignment, do_expand=self.way.is_expanded)
        if self.way.has_topk:
            found.equal("dst_row", routing.dst_row, wanted.dst_buffer_slot_idx)
        psum = routing.psum_num_recv_tokens_per_rank
        found.equal("psum of ranks", psum, wanted.psum_num_recv_tokens_per_scaleup_rank)
        found.equal("recv_src_token", routing.recv_src_token, _extended(rows.src_token, routing.num_recv_tokens, -1))
        found.equal("counts", got.num_recv_tokens_per_expert, wanted.num_unaligned_recv_tokens_per_expert)
        found.equal("aligned counts", got.num_recv_tokens_per_expert_list, rows.counts if self.way.is_exact else [])
        found.equal("psum of experts", got.psum_num_recv_tokens_per_expert, wanted.psum_num_recv_tokens_per_expert)

    def _compare_compact(self, found: Findings, rank: int, got: DispatchResult, is_cached: bool) -> None:
        wanted = self._compact[rank]
        num_rows = len(wanted.x) if self.way.is_exact else got.routing.num_rows
        found.equal("number of rows", len(got.x), num_rows)
        found.payload("recv", got.x if got.sf is None else (got.x, got.sf), wanted.x, wanted.sf, slice(len(wanted.x)))
        if is_cached:
            return
        found.equal("rank_prefix_matrix", got.rank_prefix_matrix, wanted.rank_prefix_matrix)
        if self.way.has_topk:
            found.equal("recv_topk_idx", got.topk_idx, _extended(wanted.topk_idx, num_rows, -1))
            found.equal("recv_topk_weights", got.topk_weights, _extended(wanted.topk_weights, num_rows, 0))

    def _compare_expanded(self, found: Findings, rank: int, got: DispatchResult, is_cached: bool) -> None:
        wanted, routing = self._expanded[rank], got.routing
        if self.way.is_exact:
            found.equal("number of rows", len(got.x), len(wanted.x))
        rows = (torch.ones_like(wanted.is_padding) if self.way.is_zeroed else ~wanted.is_padding).nonzero()[:, 0]
        x, sf = pick(wanted.x, rows), None if wanted.sf is None else pick(wanted.sf, rows)
        found.payload("recv", got.x if got.sf is None else (got.x, got.sf), x, sf, rows)
        found.equal("expanded_row", routing.expanded_row, _extended(wanted.expanded_row, routing.num_recv_tokens, -1))
        if not is_cached:
            found.equal("recv_topk_weights", got.topk_weights, _extended(wanted.topk_weights, len(got.x), 0))

    def check_combine(self, rank: int, got: CombineResult) -> None:
        """Compare what came home with the oracle, bit for bit."""
        found, way, alignment, bias = Findings(rank), self.way, self.case.expert_alignment, self.biases(rank)
        if way.is_expanded:
            y = expected_expanded_combine(
                self.route, self._outputs, rank, expert_alignment=alignment, bias=bias,
                allow_multiple_reduction=way.reduction is Reduction.PER_RANK,
            )  # fmt: skip
            weights = expected_expanded_weights(self.route, self._weights, rank, alignment)
        else:
            y = expected_combine(self.route, self._outputs, rank, bias=bias, by_rank=not way.has_topk)
            weights = expected_combined_weights(self.route, self._weights, rank)
        found.equal("y", got.x, y)
        found.equal("combined weights", got.topk_weights, weights if way.has_weights else None)
        found.finish()


def _cast(inputs: Inputs, sf_format: SfFormat | None) -> Inputs:
    if sf_format is None:
        return inputs
    x, sf = quant.fp8_cast(inputs.x, sf_format)
    return replace(inputs, x=x, sf=sf)


def _extended(rows: torch.Tensor, num_rows: int, fill: int) -> torch.Tensor:
    """Put behind what arrived what stands in rows where nothing did."""
    return torch.cat([rows, torch.full((num_rows - len(rows), *rows.shape[1:]), fill, dtype=rows.dtype)])
