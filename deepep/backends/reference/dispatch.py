"""Dispatch: counts, then payload, then the layout asked for."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import torch

from deepep import quant
from deepep.backends.base import DispatchRequest, DispatchResult, Layout, Routing
from deepep.backends.reference.notify import Notice, check_handles, check_room, count_matrix, notify, op_name
from deepep.backends.reference.pool import row_pool
from deepep.backends.reference.rows import send_rows, tokens_of_ranks, without
from deepep.backends.reference.spread import Spread
from deepep.layout import (
    align,
    count_experts,
    dst_rows,
    expanded_rows,
    last_slots,
    localise,
    num_expanded_rows_at_most,
    topk_ranks,
)

if TYPE_CHECKING:
    from deepep.backends.reference.backend import ReferenceBackend


def dispatch(backend: ReferenceBackend, request: DispatchRequest) -> DispatchResult:
    """Serve one dispatch request."""
    work = _Dispatch(backend, _cast_payload(request))
    return work.fresh() if request.routing is None else work.repeat(request.routing)


class _Dispatch:
    """One dispatch under way."""

    def __init__(self, backend: ReferenceBackend, request: DispatchRequest) -> None:
        self.backend = backend
        self.request = request
        self.op = op_name("dispatch", request.layout)
        self.group = backend.group
        self.num_ranks = backend.group.num_ranks
        self.num_local_experts = request.num_experts // self.num_ranks
        self.device = request.x.device
        known = request.routing
        self.dst_rank = self._route() if known is None else known.dst_rank.to(torch.int64)
        self.picks = tokens_of_ranks(self.dst_rank, self.num_ranks)
        self.deadline = time.monotonic() + backend.options.timeout

    def fresh(self) -> DispatchResult:
        """Route, agree on counts, move rows and lay them out."""
        request, rank = self.request, self.group.rank
        counts, notices = self._notify()
        arriving = counts[:, rank]
        num_tokens = int(arriving.sum())
        num_rows = num_tokens if request.num_worst_rows is None else self._num_worst_tokens()
        topk_idx, topk_weights = self._receive_topk(arriving, num_rows)
        if topk_idx is not None:
            expert_counts = count_experts(topk_idx, self.num_local_experts)
        else:
            said = torch.tensor([list(n.num_tokens_per_expert) for n in notices if n is not None], device="cpu")
            mine = slice(rank * self.num_local_experts, (rank + 1) * self.num_local_experts)
            expert_counts = said[:, mine].sum(dim=0).to(torch.int32).to(self.device)
        aligned = [align(int(count), request.expert_alignment) for count in expert_counts.tolist()]
        routing = Routing(
            layout=request.layout,
            num_experts=request.num_experts,
            num_max_tokens_per_rank=request.num_max_tokens_per_rank,
            expert_alignment=request.expert_alignment,
            num_recv_tokens=num_rows,
            num_rows=self._num_rows(num_rows, aligned),
            topk_idx=_kept_choices(request),
            dst_rank=self.dst_rank.to(torch.int32),
            dst_row=dst_rows(self.dst_rank, counts[:rank].sum(dim=0).to(self.device)),
            psum_num_recv_tokens_per_rank=arriving.cumsum(0).to(torch.int32).to(self.device),
            recv_src_token=self._source_tokens(arriving, num_rows),
            expanded_row=self._expanded_row(topk_idx, aligned),
        )
        result = self._lay_out(routing, arriving, topk_idx, topk_weights)
        if request.cumulative_local_expert_recv_stats is not None:
            request.cumulative_local_expert_recv_stats.add_(expert_counts)
        is_compact = request.layout is Layout.COMPACT
        exact = request.num_worst_rows is None and request.layout is not Layout.PADDED
        return dataclasses.replace(
            result,
            num_recv_tokens_per_expert=expert_counts,
            num_recv_tokens_per_expert_list=aligned if exact else [],
            rank_prefix_matrix=counts.cumsum(0).to(torch.int32).to(self.device) if is_compact else None,
        )

    def repeat(self, routing: Routing) -> DispatchResult:
        """Move rows along a known routing."""
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        arriving = routing.psum_num_recv_tokens_per_rank.cpu().to(torch.int64).diff(prepend=zero)
        self._notify(tuple(arriving.tolist()))
        topk_idx, topk_weights = self._receive_topk(arriving, routing.num_recv_tokens)
        return self._lay_out(routing, arriving, topk_idx, topk_weights)

    def _route(self) -> torch.Tensor:
        request = self.request
        if request.topk_idx is not None:
            ranks = topk_ranks(request.topk_idx, self.num_local_experts)
        elif request.is_token_in_rank is not None:
            ranks = torch.where(request.is_token_in_rank, torch.arange(self.num_ranks, device=self.device), -1)
        else:
            raise TypeError("a DispatchRequest needs topk_idx, is_token_in_rank or a routing")
        return last_slots(without(ranks, self.backend.masked))

    def _notify(self, known: tuple[int, ...] = ()) -> tuple[torch.Tensor, list[Notice | None]]:
        """Tell and hear what comes; `known` is what a handle says will come from each rank."""
        request = self.request
        experts = request.num_tokens_per_expert
        mine = Notice(
            op=self.op,
            terms={
                "hidden": request.x.shape[1],
                "dtype": str(request.x.dtype),
                "number of scale factors": None if request.sf is None else request.sf.shape[1],
                "dtype of scale factors": None if request.sf is None else str(request.sf.dtype),
                "num_experts": request.num_experts,
                "num_max_tokens_per_rank": request.num_max_tokens_per_rank,
                "num_topk": None if request.topk_idx is None else request.topk_idx.shape[1],
                "use of topk_weights": request.topk_weights is not None,
                "layout": request.layout.value,
                "cached handle": bool(known),
            },
            num_tokens_per_rank=tuple(pick.numel() for pick in self.picks),
            num_tokens_from_rank=known,
            num_tokens_per_expert=() if experts is None else tuple(experts.tolist()),
            num_worst_rows=None if request.num_worst_rows is None else self._num_worst_tokens(),
        )
        notices = notify(self.group, mine, self._time_left(), self.backend.masked)
        counts = count_matrix(notices)
        counts[:, self.backend.masked] = 0
        check_room(mine.op, notices, counts)
        check_handles(mine.op, notices)
        return counts, notices

    def _num_worst_tokens(self) -> int:
        """Compact rows to allocate where shapes are worst-case."""
        request = self.request
        if request.layout is Layout.COMPACT and request.num_worst_rows is not None:
            return request.num_worst_rows
        return self.num_ranks * request.num_max_tokens_per_rank

    def _num_rows(self, num_tokens: int, aligned: list[int]) -> int:
        request = self.request
        if request.layout is Layout.COMPACT:
            return num_tokens
        if request.layout is Layout.PADDED:
            return self.num_local_experts * self.num_ranks * request.num_max_tokens_per_rank
        if request.num_worst_rows is None or request.topk_idx is None:
            return sum(aligned)
        num_topk = request.topk_idx.shape[1]
        return num_expanded_rows_at_most(num_tokens, num_topk, self.num_local_experts, request.expert_alignment)

    def _receive_topk(self, arriving: torch.Tensor, num_rows: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Move top-k and weights; give them in compact order, localised, with -1 and 0 in the tail."""
        request = self.request
        if request.topk_idx is None:
            return None, None
        topk_idx = self._move(request.topk_idx, arriving, num_rows, fill=-1)
        weights = None
        if request.topk_weights is not None:
            weights = self._move(request.topk_weights, arriving, num_rows, fill=0)
        return localise(topk_idx, weights, self.group.rank, self.num_local_experts)

    def _source_tokens(self, arriving: torch.Tensor, num_rows: int) -> torch.Tensor:
        tokens = torch.arange(self.dst_rank.shape[0], dtype=torch.int32, device=self.device).unsqueeze(1)
        return self._move(tokens, arriving, num_rows, fill=-1).squeeze(1)

    def _expanded_row(self, topk_idx: torch.Tensor | None, aligned: list[int]) -> torch.Tensor | None:
        request = self.request
        if topk_idx is None or request.layout is Layout.COMPACT:
            return None
        sizes = torch.tensor(aligned, device=self.device)
        if request.layout is Layout.PADDED:
            sizes = torch.full_like(sizes, self.num_ranks * request.num_max_tokens_per_rank)
        return expanded_rows(topk_idx, sizes.cumsum(0) - sizes)

    def _lay_out(
        self,
        routing: Routing,
        arriving: torch.Tensor,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
    ) -> DispatchResult:
        """Move payload and scale factors and put them where the layout wants them."""
        request = self.request
        started = time.monotonic()
        x = self._move(request.x, arriving, routing.num_recv_tokens)
        sf = None if request.sf is None else self._move(request.sf.contiguous(), arriving, routing.num_recv_tokens)
        self.backend.count_wait(request.wait_recv_cost_stats, arriving, time.monotonic() - started)
        row_bytes = _row_bytes(request.x, request.sf)
        self.backend.traffic.add([pick.numel() for pick in self.picks], self.group.rank, row_bytes)
        if routing.expanded_row is None:
            return DispatchResult(x, sf, topk_idx, topk_weights, None, [], routing)
        spread = Spread(routing.expanded_row, routing.num_rows, request.do_zero_padding)
        weights = None if topk_weights is None else spread.choices(topk_weights)
        if request.layout is Layout.EXPANDED:
            return DispatchResult(
                spread.rows(x), None if sf is None else spread.rows(sf), None, weights, None, [], routing
            )
        return self._padded(routing, spread, x, sf, topk_idx)

    def _padded(
        self, routing: Routing, spread: Spread, x: torch.Tensor, sf: torch.Tensor | None, topk_idx: torch.Tensor | None
    ) -> DispatchResult:
        if topk_idx is None:
            raise TypeError("padded rows need topk_idx")
        num_local, room = self.num_local_experts, self.num_ranks * routing.num_max_tokens_per_rank
        recv_x = row_pool.empty(num_local * room, x.shape[1], x.dtype, self.device)
        recv_sf = None
        if sf is not None:
            # Column-major in the last two dimensions, as grouped GEMMs want it.
            recv_sf = torch.empty(num_local, sf.shape[1], room, dtype=sf.dtype, device=self.device).transpose(1, 2)
        src_info = torch.zeros(num_local * room, 1, dtype=torch.int32, device=self.device)
        spread.into(src_info, routing.recv_src_token.unsqueeze(1))

        def finish() -> None:
            spread.into(recv_x, x)
            if sf is not None and recv_sf is not None:
                spread.into_3d(recv_sf, sf)

        if not self.request.split_phases:
            finish()
        return DispatchResult(
            recv_x.view(num_local, room, -1),
            recv_sf,
            None,
            None,
            None,
            [],
            routing,
            src_info=src_info.view(num_local, room),
            layout_range=self._layout_range(routing, topk_idx),
            finish=finish if self.request.split_phases else None,
        )

    def _layout_range(self, routing: Routing, topk_idx: torch.Tensor) -> torch.Tensor:
        """Say where each source rank's rows lie inside each expert: [L, R] int64 `begin << 32 | count`."""
        psum = routing.psum_num_recv_tokens_per_rank.to(torch.int64)
        source = torch.searchsorted(psum, torch.arange(topk_idx.shape[0], device=self.device), right=True)
        cell = topk_idx * self.num_ranks + source.unsqueeze(1)
        num_cells = self.num_local_experts * self.num_ranks
        count = torch.bincount(cell[topk_idx >= 0], minlength=num_cells).view(-1, self.num_ranks)
        begin = count.cumsum(dim=1) - count
        return (begin << 32) | count

    def _move(
        self, source: torch.Tensor, arriving: torch.Tensor, num_rows: int, fill: int | None = None
    ) -> torch.Tensor:
        out = row_pool.empty(num_rows, source.shape[1], source.dtype, self.device)
        if fill is not None:
            out[int(arriving.sum()) :] = fill
        send_rows(self.group, source, self.picks, arriving.tolist(), out, self.op, self._time_left())
        return out

    def _time_left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)


def _cast_payload(request: DispatchRequest) -> DispatchRequest:
    if request.sf_format is None:
        return request
    x, sf = quant.fp8_cast(request.x, request.sf_format)
    return dataclasses.replace(request, x=x, sf=sf, sf_format=None)


def _kept_choices(request: DispatchRequest) -> torch.Tensor | None:
    """Give `topk_idx` as sent. Decoders fill the same tensor again for the next batch, so low latency keeps a copy."""
    if request.topk_idx is None or request.layout is not Layout.PADDED:
        return request.topk_idx
    return request.topk_idx.clone()


def _row_bytes(x: torch.Tensor, sf: torch.Tensor | None) -> int:
    return x.shape[1] * x.element_size() + (0 if sf is None else sf.shape[1] * sf.element_size())
