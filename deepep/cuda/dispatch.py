"""Dispatch as launches: notify, beside a copy of the rows into the window; the wait for counts where shapes are exact; the
kernel that fetches rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from deepep import quant
from deepep.backends.base import DispatchRequest, DispatchResult, Routing
from deepep.cuda import kernels
from deepep.cuda.arguments import DispatchArgs
from deepep.cuda.dispatch_plan import Plan, plan_of
from deepep.cuda.engine import Counts, Engine


@dataclass(frozen=True)
class Sent:
    """What a fresh exact dispatch remembers for statistics: rows sent to each rank, and bytes of a row."""

    num_rows: tuple[int, ...]
    row_bytes: int


def dispatch(engine: Engine, request: DispatchRequest) -> DispatchResult:
    """Serve one dispatch request into compact or expanded rows.

    Raises:
        InvalidArgument: the window is too small, or ranks disagree.
        CommTimeout: a rank did not arrive.
    """
    engine.status.begin("dispatch")
    return _Dispatch(engine, _as_kernels_take_it(request)).run()


class _Dispatch:
    """One dispatch under way."""

    def __init__(self, engine: Engine, request: DispatchRequest) -> None:
        self.engine, self.request = engine, request
        self.plan: Plan = plan_of(engine, request)
        self.args = DispatchArgs.from_buffer_copy(self.plan.args)
        self.device = request.x.device
        self.keep: list[torch.Tensor] = []

    def run(self) -> DispatchResult:
        """Do it."""
        engine, request, args = self.engine, self.request, self.args
        engine.prepare(args.window, request.num_experts)
        args.x = request.x.data_ptr()
        if request.sf is not None:
            args.sf = request.sf.data_ptr()
        if request.wait_recv_cost_stats is not None:
            args.wait_stats = request.wait_recv_cost_stats.data_ptr()
        if request.routing is not None and self.plan.is_cached:
            return self._repeat(request.routing)
        return self._fresh()

    def _repeat(self, routing: Routing) -> DispatchResult:
        """Fetch along a known routing."""
        args = self.args
        args.psum_ranks = routing.psum_num_recv_tokens_per_rank.data_ptr()
        args.recv_src_token = routing.recv_src_token.data_ptr()
        if routing.expanded_row is not None:
            args.expanded_row = routing.expanded_row.data_ptr()
            args.num_topk = routing.expanded_row.shape[1]
        # Nothing says here which rows stay empty.
        recv_x, recv_sf = self._receive(routing.num_rows, is_cleared=self.request.do_zero_padding)
        for target, source, num_bytes in self._copies():
            self.engine.copies.copy(target, source, num_bytes, self.engine.stream())
        self._fetch()
        return DispatchResult(recv_x, recv_sf, None, None, None, [], routing)

    def _fresh(self) -> DispatchResult:
        request, plan, args = self.request, self.plan, self.args
        num_ranks, num_tokens = self.engine.num_ranks, request.x.shape[0]
        dst_rank, dst_row = self._int32(num_tokens, plan.num_slots), self._int32(num_tokens, plan.num_slots)
        psum, counts = self._int32(num_ranks), self._int32(plan.num_local_experts)
        matrix = None if plan.is_expanded else self._int32(num_ranks, num_ranks)
        args.dst_rank, args.dst_row, args.psum_ranks = dst_rank.data_ptr(), dst_row.data_ptr(), psum.data_ptr()
        args.counts_out = counts.data_ptr()
        if matrix is not None:
            args.rank_prefix_matrix = matrix.data_ptr()
        self._point("topk_idx", request.topk_idx)
        self._point("topk_weights", request.topk_weights)
        self._point("is_token_in_rank", request.is_token_in_rank)
        self._point("tokens_per_expert", request.num_tokens_per_expert)
        if request.routing is None:
            self._point("stats", request.cumulative_local_expert_recv_stats)
        copies, stream = self.engine.copies, self.engine.stream()
        if any(plan.copied):
            copies.fork(stream)
        self._notify()
        for target, source, num_bytes in self._copies():
            copies.copy_beside(target, source, num_bytes)
        num_compact, num_rows, aligned, private = plan.num_compact_rows, plan.num_rows, [], None
        if plan.is_exact:
            found: Counts = self.engine.wait_counts(plan.num_local_experts, request.expert_alignment)
            num_compact, aligned = found.num_tokens, found.aligned
            num_rows = sum(aligned) if plan.is_expanded else num_compact
            args.num_compact_rows, args.num_rows = num_compact, num_rows
            private = Sent(found.sent, plan.row_bytes)
        recv_x, recv_sf = self._receive(num_rows, is_cleared=False)
        src_token = self._int32(num_compact)
        args.recv_src_token = src_token.data_ptr()
        expanded_row, idx, weights = self._receive_metadata(num_compact, num_rows)
        if any(plan.copied):
            copies.join(stream)
        self._fetch()
        if request.routing is not None:
            return DispatchResult(recv_x, recv_sf, idx, weights, None, [], request.routing)
        routing = Routing(
            request.layout, request.num_experts, request.num_max_tokens_per_rank, request.expert_alignment,
            num_compact, num_rows, request.topk_idx, dst_rank, dst_row, psum, src_token, expanded_row, private,
        )  # fmt: skip
        return DispatchResult(
            recv_x, recv_sf, idx, weights, counts, aligned, routing, rank_prefix_matrix=matrix
        )  # fmt: skip

    def _copies(self) -> Iterator[tuple[int, int, int]]:
        """List what is to be copied into the window: target, source, bytes."""
        args, base = self.args, self.engine.memory.base
        places = ((args.rows_offset, args.x), (args.sf_offset, args.sf))
        for (offset, source), num_bytes in zip(places, self.plan.copied, strict=True):
            if num_bytes:
                yield base + offset, source, num_bytes

    def _notify(self) -> None:
        plan, args = self.plan, self.args
        args.cut = plan.notify_cut
        threads = 32 * (args.num_walkers + plan.notify_cut.num_warps)
        self.engine.launch(kernels.NOTIFY, plan.num_sms, threads, plan.notify_smem, args)
        args.cut = plan.args.cut

    def _fetch(self) -> None:
        plan = self.plan
        spec = kernels.DISPATCH_EXPANDED if plan.is_expanded else kernels.DISPATCH_COMPACT
        threads = 32 * (plan.args.cut.num_warps + kernels.NUM_CLERK_WARPS)
        self.engine.launch(spec, plan.num_sms, threads, plan.pull_smem, self.args)

    def _receive(self, num_rows: int, *, is_cleared: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Allocate payload and scale factors."""
        plan, args = self.plan, self.args
        make = torch.zeros if is_cleared else torch.empty
        recv_x = make((num_rows, plan.args.hidden), dtype=plan.recv_dtype, device=self.device)
        args.recv_x = recv_x.data_ptr()
        if plan.sf_dtype is None:
            return recv_x, None
        recv_sf = make((num_rows, plan.args.num_sf), dtype=plan.sf_dtype, device=self.device)
        args.recv_sf = recv_sf.data_ptr()
        return recv_x, recv_sf

    def _receive_metadata(
        self, num_compact: int, num_rows: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Allocate expanded rows, or top-k, and weights."""
        plan, args = self.plan, self.args
        expanded_row, idx, weights = None, None, None
        if plan.is_expanded:
            expanded_row = self._int32(num_compact, plan.num_topk)
            args.expanded_row = expanded_row.data_ptr()
        elif plan.num_topk:
            idx = torch.empty((num_compact, plan.num_topk), dtype=torch.int64, device=self.device)
            args.recv_topk_idx = idx.data_ptr()
        if self.request.topk_weights is not None:
            shape = (num_rows,) if plan.is_expanded else (num_compact, plan.num_topk)
            weights = torch.empty(shape, dtype=torch.float32, device=self.device)
            args.recv_topk_weights = weights.data_ptr()
        return expanded_row, idx, weights

    def _int32(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.device)

    def _point(self, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None:
            return
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self.keep.append(tensor)
        setattr(self.args, name, tensor.data_ptr())


def _as_kernels_take_it(request: DispatchRequest) -> DispatchRequest:
    """Kernels cast bf16 and read contiguous rows of 16 bytes each; the rest is brought into that form before."""
    if request.sf_format is not None and request.x.dtype != torch.bfloat16:
        x, sf = quant.fp8_cast(request.x, request.sf_format)
        return replace(request, x=x, sf=sf, sf_format=None)
    if not request.x.is_contiguous() or request.x.data_ptr() % 16:
        return replace(request, x=request.x.clone(memory_format=torch.contiguous_format))
    return request
