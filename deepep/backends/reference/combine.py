"""Combine: rows go home and are added up in the order that CONTRACT states."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from deepep import quant
from deepep.backends.base import CombineRequest, CombineResult, Layout, Reduction, WeightSource
from deepep.backends.reference.notify import Notice, check_handles, notify, op_name
from deepep.backends.reference.rows import ordered_sum, return_rows, send_rows, tokens_of_ranks, without
from deepep.errors import InvalidArgument
from deepep.layout import last_slots, slot_positions, topk_ranks

if TYPE_CHECKING:
    from deepep.backends.reference.backend import ReferenceBackend


def combine(backend: ReferenceBackend, request: CombineRequest) -> CombineResult:
    """Serve one combine request."""
    work = _Combine(backend, request)
    work.agree()
    if request.reduction is Reduction.PER_COPY and request.routing.expanded_row is not None:
        total = work.per_copy()
    else:
        total = work.per_rank()
    weights = work.weights()
    return work.deliver(total, weights)


class _Combine:
    """One combine under way."""

    def __init__(self, backend: ReferenceBackend, request: CombineRequest) -> None:
        self.backend = backend
        self.request = request
        self.routing = request.routing
        self.op = op_name("combine", request.routing.layout)
        self.group = backend.group
        self.num_ranks = backend.group.num_ranks
        self.deadline = time.monotonic() + backend.options.timeout
        masked = backend.masked
        self.dst_rank = without(self.routing.dst_rank.to(torch.int64), masked)
        psum = self.routing.psum_num_recv_tokens_per_rank.cpu().to(torch.int64)
        # Compact rows of each source rank here, and of mine at each destination.
        self.held = [(int(end - n), int(end)) for end, n in zip(psum, psum.diff(prepend=psum[:1] * 0), strict=True)]
        self.held = [(begin, begin if rank in masked else end) for rank, (begin, end) in enumerate(self.held)]
        self.picks = tokens_of_ranks(self.dst_rank, self.num_ranks)
        self.coming = [pick.numel() for pick in self.picks]

    def agree(self) -> None:
        """Find the payload, and compare with the other ranks what this call is."""
        request = self.request
        try:
            x = self.backend.take_combine_buffer(self.routing) if request.zero_copy else request.x
        except InvalidArgument as error:
            self.backend.refuse(self.op, error)
            raise
        self.payload = x.reshape(-1, x.shape[-1])
        mine = Notice(
            op=self.op,
            terms={
                "hidden": request.x.shape[-1],
                "dtype": str(request.x.dtype),
                "layout": self.routing.layout.value,
                "num_experts": self.routing.num_experts,
                "use of topk_weights": request.topk_weights is not None,
                "num_topk": _num_topk(request),
                "reduction": request.reduction.value,
                "use_logfmt": request.use_logfmt,
            },
            num_tokens_per_rank=tuple(end - begin for begin, end in self.held),
            num_tokens_from_rank=tuple(self.coming),
        )
        check_handles(self.op, notify(self.group, mine, self._time_left(), self.backend.masked))

    def per_rank(self) -> torch.Tensor:
        """One row per (token, rank) travels; gives the sum over ranks, [T, H]."""
        rows = self.payload
        if self.routing.expanded_row is not None:
            index, scale = self._slots_at_owner(self.routing.expanded_row)
            rows = ordered_sum(rows, index, scale=scale)
        rows = self._cast(rows)
        home = self._go_home(rows)
        index = self._index_at_home(self.dst_rank)
        if self._is_two_level():
            return self._two_level_sum(home, index)
        return ordered_sum(home, index, self.request.bias)

    def _is_two_level(self) -> bool:
        if self.routing.layout is Layout.PADDED or self.request.reduction is Reduction.PER_COPY:
            return False
        return self.backend.options.allow_hybrid_mode and self.backend.topology.num_scaleout_ranks > 1

    def per_copy(self) -> torch.Tensor:
        """One row per (token, expert) travels; gives the sum over top-k positions, [T, H]."""
        request, routing = self.request, self.routing
        if routing.expanded_row is None or routing.topk_idx is None:
            raise TypeError("per_copy needs expanded rows")
        copies, counts = [], []
        for begin, end in self.held:
            mine = routing.expanded_row[begin:end]
            copies.append(mine[mine >= 0])
            counts.append(copies[-1].numel())
        travelling = self._cast(self.payload.index_select(0, torch.cat(copies).to(torch.int64)))
        ranks = topk_ranks(routing.topk_idx, routing.num_experts // self.num_ranks)
        ranks = without(ranks, self.backend.masked)
        coming = [int((ranks == rank).sum()) for rank in range(self.num_ranks)]
        home = self._exchange_back(travelling, counts, coming)
        # Copies of one rank arrive in (token, top-k position) order: number them so.
        index = torch.full_like(ranks, -1)
        first = 0
        for rank, count in enumerate(coming):
            index[ranks == rank] = torch.arange(first, first + count, device=index.device)
            first += count
        if request.scale_topk_idx is not None:
            index = torch.where(request.scale_topk_idx >= 0, index, -1)
        return ordered_sum(home, index, request.bias, request.scale_topk_weights)

    def weights(self) -> torch.Tensor | None:
        """Bring weights back beside the rows: [T, K] float32, or None."""
        given = self.request.topk_weights
        if given is None:
            return None
        if self.routing.expanded_row is not None:
            slots = self.routing.expanded_row
            given = torch.where(slots >= 0, given[slots.clamp(min=0).to(torch.int64)], 0.0) if given.numel() else (
                torch.zeros(slots.shape, dtype=torch.float32, device=slots.device)
            )  # fmt: skip
        home = self._go_home(given)
        if self.request.weight_source is WeightSource.ALL_RANKS or self.routing.topk_idx is None:
            return ordered_sum(home, self._index_at_home(self.dst_rank))
        ranks = topk_ranks(self.routing.topk_idx, self.routing.num_experts // self.num_ranks)
        if home.shape[0] == 0:
            return torch.zeros(ranks.shape, dtype=torch.float32, device=ranks.device)
        row = self._index_at_home(ranks)
        return torch.where(row >= 0, home.gather(0, row.clamp(min=0)), 0.0)

    def deliver(self, total: torch.Tensor, weights: torch.Tensor | None) -> CombineResult:
        """Write to `out` where asked for, at once or when the caller says so."""
        request = self.request
        row_bytes = request.x.shape[-1] * request.x.element_size()
        self.backend.traffic.add([end - begin for begin, end in self.held], self.group.rank, row_bytes)
        if request.out is None and not request.split_phases:
            return CombineResult(total, weights)
        out = torch.empty_like(total) if request.out is None else request.out
        if not request.split_phases:
            out.copy_(total)
            return CombineResult(out, weights)

        @torch.no_grad()
        def finish() -> None:
            out.copy_(total)

        return CombineResult(out, weights, finish)

    def _cast(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the cast to every row that combine adds up, also those that never leave this rank."""
        return quant.logfmt_roundtrip(rows) if self.request.use_logfmt else rows

    def _slots_at_owner(self, expanded_row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Give the rows that this rank adds up per compact row, and their factors, which travel here from home."""
        request = self.request
        if request.scale_topk_weights is None or request.scale_topk_idx is None:
            return expanded_row, None
        weights = self._to_owners(request.scale_topk_weights)
        chosen = self._to_owners(request.scale_topk_idx)
        return torch.where(chosen >= 0, expanded_row[: chosen.shape[0]], -1), weights

    def _to_owners(self, values: torch.Tensor) -> torch.Tensor:
        num_held = [end - begin for begin, end in self.held]
        num_tokens = int(self.routing.psum_num_recv_tokens_per_rank[-1])
        out = torch.zeros(num_tokens, values.shape[1], dtype=values.dtype, device=values.device)
        arrived = torch.empty(sum(num_held), values.shape[1], dtype=values.dtype, device=values.device)
        send_rows(self.group, values, self.picks, num_held, arrived, self.op, self._time_left())
        first = 0
        for begin, end in self.held:
            out[begin:end] = arrived[first : first + end - begin]
            first += end - begin
        return out

    def _go_home(self, rows: torch.Tensor) -> torch.Tensor:
        num_held = [end - begin for begin, end in self.held]
        if self.backend.masked:
            rows = torch.cat([rows[begin:end] for begin, end in self.held])
        return self._exchange_back(rows, num_held, self.coming)

    def _exchange_back(self, rows: torch.Tensor, num_sent: list[int], coming: list[int]) -> torch.Tensor:
        started = time.monotonic()
        home = return_rows(self.group, rows.contiguous(), num_sent, coming, self.op, self._time_left())
        self.backend.count_wait(
            self.request.wait_recv_cost_stats, torch.tensor(coming, device="cpu"), time.monotonic() - started
        )
        return home

    def _index_at_home(self, ranks: torch.Tensor) -> torch.Tensor:
        """Say where the row from each slot's rank lies among those that came home: [T, S] int64, -1 for none."""
        coming = torch.tensor(self.coming, device=ranks.device)
        first = coming.cumsum(0) - coming
        position = slot_positions(ranks, self.num_ranks)
        return torch.where(ranks >= 0, position + first[ranks.clamp(min=0)], -1)

    def _two_level_sum(self, home: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Add up each host's ranks first and round, then the hosts in the order of their highest slot."""
        per_host = self.backend.topology.num_scaleup_ranks
        hosts = torch.where(self.dst_rank >= 0, self.dst_rank // per_host, -1)
        num_tokens = index.shape[0]
        parts = [
            ordered_sum(home, torch.where(hosts == host, index, -1))
            for host in range(self.backend.topology.num_scaleout_ranks)
        ]
        host_slots = last_slots(hosts)
        token = torch.arange(num_tokens, device=index.device).unsqueeze(1)
        host_index = torch.where(host_slots >= 0, host_slots * num_tokens + token, -1)
        return ordered_sum(torch.cat(parts), host_index, self.request.bias)

    def _time_left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)


def _num_topk(request: CombineRequest) -> int | None:
    """Give the K that travels: of the weights, or of a low-latency token."""
    given = request.scale_topk_idx if request.topk_weights is None else request.topk_weights
    return None if given is None or given.dim() < 2 else given.shape[1]
