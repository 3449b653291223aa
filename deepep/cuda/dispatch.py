"""Dispatch as launches: notify, beside a copy of the rows into the window; then the kernel that fetches rows.

Between the two the CPU waits for counts where shapes are exact; the GPU in turn waits for what the CPU does after that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from deepep import quant
from deepep.backends.base import DispatchRequest, DispatchResult, Routing
from deepep.cuda import kernels
from deepep.cuda.arguments import DispatchArgs, write_routing
from deepep.cuda.dispatch_plan import Plan, plan_of
from deepep.cuda.engine import Engine
from deepep.cuda.launch import aligned, pointer
from deepep.cuda.like import empty
from deepep.errors import InvalidArgument


class _Outputs(NamedTuple):
    """What notify writes."""

    dst_rank: torch.Tensor
    dst_row: torch.Tensor
    psum: torch.Tensor
    counts: torch.Tensor
    psum_experts: torch.Tensor
    matrix: torch.Tensor | None


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
        if self.plan.is_exact and torch.cuda.is_current_stream_capturing():
            raise InvalidArgument(
                "dispatch: exact shapes wait for counts on the CPU, which a capture cannot; pass num_worst_tokens, or "
                "do_cpu_sync=False, or a handle"
            )
        self.args = DispatchArgs.from_buffer_copy(self.plan.args)
        self.device = request.x.device
        self.stream = 0
        self.keep: list[torch.Tensor] = []
        self.aligned: list[int] | None = None

    def run(self) -> DispatchResult:
        """Do it."""
        engine, request, args = self.engine, self.request, self.args
        self.stream = engine.prepare(args.window, request.num_experts)
        args.x = request.x.data_ptr()
        if request.sf is not None:
            args.sf = request.sf.data_ptr()
        if request.routing is not None and self.plan.is_cached:
            return self._repeat(request.routing)
        return self._fresh()

    def _repeat(self, routing: Routing) -> DispatchResult:
        """Fetch along a known routing."""
        args = self.args
        args.psum_ranks = routing.psum_num_recv_tokens_per_rank.data_ptr()
        args.recv_src_token = routing.recv_src_token.data_ptr()
        args.wait_stats = pointer(self.request.wait_recv_cost_stats)
        if routing.expanded_row is not None:
            args.expanded_row = routing.expanded_row.data_ptr()
            args.num_topk = routing.expanded_row.shape[1]
        # Nothing says here which rows stay empty.
        recv_x, recv_sf = self._receive(routing.num_rows, is_cleared=self.request.do_zero_padding)
        for target, source, num_bytes in self._copies():
            self.engine.copies.copy(target, source, num_bytes, self.stream)
        self._fetch()
        return DispatchResult(recv_x, recv_sf, None, None, None, [], routing)

    def _fresh(self) -> DispatchResult:
        request, plan = self.request, self.plan
        block = self._point_to_outputs()
        copied = any(plan.copied)
        if copied:
            self.engine.copies.fork(self.stream)
        self._notify()
        for target, source, num_bytes in self._copies():
            self.engine.copies.copy_beside(target, source, num_bytes)
        # While the CPU would wait for notify, or else once everything is launched.
        views = self._views(block) if plan.is_exact else None
        num_compact, num_rows = self._sizes()
        try:
            recv_x, recv_sf = self._receive(num_rows, is_cleared=False)
            metadata, weights = self._receive_metadata(num_compact, num_rows)
        except BaseException:  # out of memory: this rank is through, and the others need not wait for it to say so
            self.engine.barrier_launch(is_close=True)
            raise
        finally:
            if copied:
                self.engine.copies.join(self.stream)
        self._fetch()
        src_token, expanded_row, idx = self._metadata_views(metadata, num_compact)
        if request.routing is not None:
            return DispatchResult(recv_x, recv_sf, idx, weights, None, [], request.routing)
        outputs = views or self._views(block)
        aligned = self._aligned() if plan.is_exact else []
        routing = Routing(
            request.layout, request.num_experts, request.num_max_tokens_per_rank, request.expert_alignment,
            num_compact, num_rows, request.topk_idx, outputs.dst_rank, outputs.dst_row, outputs.psum, src_token,
            expanded_row,
            Sent(self.engine.sent_counts(), plan.row_bytes) if plan.is_exact else None,
        )  # fmt: skip
        return DispatchResult(
            recv_x, recv_sf, idx, weights, outputs.counts, aligned, routing, rank_prefix_matrix=outputs.matrix,
            psum_num_recv_tokens_per_expert=outputs.psum_experts,
        )  # fmt: skip

    def _point_to_outputs(self) -> torch.Tensor:
        """Point to inputs of notify, and to its outputs: one block, for one allocation; they belong to one handle."""
        request, plan, args = self.request, self.plan, self.args
        parts = plan.parts
        block = empty((parts.end,), torch.int32, self.device)
        address = block.data_ptr()
        write_routing(
            args, DispatchArgs.topk_idx.offset,
            self._address(request.topk_idx), self._address(request.topk_weights),
            self._address(request.is_token_in_rank), self._address(request.num_tokens_per_expert),
            address, address + 4 * parts.dst_row, 0 if plan.is_expanded else address + 4 * parts.matrix,
            address + 4 * parts.psum, address + 4 * parts.counts, address + 4 * parts.psum_experts,
            0 if request.routing is not None else self._address(request.cumulative_local_expert_recv_stats),
            pointer(request.wait_recv_cost_stats),
        )  # fmt: skip
        return block

    def _views(self, block: torch.Tensor) -> _Outputs:
        """Give the outputs of notify as views of their block."""
        plan, parts, num_ranks = self.plan, self.plan.parts, self.engine.num_ranks
        shape, strides = (int(plan.args.num_tokens), plan.num_slots), (plan.num_slots, 1)
        return _Outputs(
            block.as_strided(shape, strides),
            block.as_strided(shape, strides, parts.dst_row),
            block.as_strided((num_ranks,), (1,), parts.psum),
            block.as_strided((plan.num_local_experts,), (1,), parts.counts),
            block.as_strided((plan.num_local_experts,), (1,), parts.psum_experts),
            None if plan.is_expanded else block.as_strided((num_ranks, num_ranks), (num_ranks, 1), parts.matrix),
        )

    def _sizes(self) -> tuple[int, int]:
        """Give compact rows and rows of the result, waiting for them where they are exact."""
        plan, args = self.plan, self.args
        if not plan.is_exact:
            return plan.num_compact_rows, plan.num_rows
        num_compact = self.engine.wait_counts()
        num_rows = sum(self._aligned()) if plan.is_expanded else num_compact
        args.num_compact_rows, args.num_rows = num_compact, num_rows
        return num_compact, num_rows

    def _aligned(self) -> list[int]:
        """Aligned rows per expert, of an exact dispatch whose counts are there."""
        if self.aligned is None:
            self.aligned = self.engine.aligned_counts(self.plan.num_local_experts, self.request.expert_alignment)
        return self.aligned

    def _copies(self) -> list[tuple[int, int, int]]:
        """List what is to be copied into the window: target, source, bytes."""
        args, base, (num_row_bytes, num_sf_bytes) = self.args, self.engine.memory.base, self.plan.copied
        copies = []
        if num_row_bytes:
            copies.append((base + args.rows_offset, args.x, num_row_bytes))
        if num_sf_bytes:
            copies.append((base + args.sf_offset, args.sf, num_sf_bytes))
        return copies

    def _notify(self) -> None:
        plan, args = self.plan, self.args
        args.cut = plan.notify_cut
        self.engine.launch(kernels.NOTIFY, plan.num_sms, plan.notify_threads, plan.notify_smem, args, self.stream)
        args.cut = plan.args.cut

    def _fetch(self) -> None:
        plan = self.plan
        spec = kernels.DISPATCH_EXPANDED if plan.is_expanded else kernels.DISPATCH_COMPACT
        self.engine.launch(spec, plan.num_sms, plan.pull_threads, plan.pull_smem, self.args, self.stream)

    def _receive(self, num_rows: int, *, is_cleared: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Allocate payload and scale factors."""
        plan, args = self.plan, self.args
        make = torch.zeros if is_cleared else torch.empty if plan.is_exact else empty
        recv_x = make((num_rows, plan.args.hidden), dtype=plan.recv_dtype, device=self.device)
        args.recv_x = recv_x.data_ptr()
        if plan.sf_dtype is None:
            return recv_x, None
        recv_sf = make((num_rows, plan.args.num_sf), dtype=plan.sf_dtype, device=self.device)
        args.recv_sf = recv_sf.data_ptr()
        return recv_x, recv_sf

    def _receive_metadata(self, num_compact: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Allocate what says where rows come from, as one block, and weights.

        Weights stand alone: users may put them through autograd, which treats a view in its own way.
        """
        plan, args = self.plan, self.args
        num_entries = num_compact * plan.num_topk
        # Top-k numbers or expanded rows first, then token numbers.
        if plan.is_expanded:
            block = torch.empty(num_entries + num_compact, dtype=torch.int32, device=self.device)
            args.expanded_row, num_bytes = block.data_ptr(), 4 * num_entries
        else:
            block = torch.empty(num_entries + (num_compact + 1) // 2, dtype=torch.int64, device=self.device)
            num_bytes = 8 * num_entries
            if plan.num_topk:
                args.recv_topk_idx = block.data_ptr()
        args.recv_src_token = block.data_ptr() + num_bytes
        weights = None
        if self.request.topk_weights is not None:
            shape = (num_rows,) if plan.is_expanded else (num_compact, plan.num_topk)
            weights = torch.empty(shape, dtype=torch.float32, device=self.device)
            args.recv_topk_weights = weights.data_ptr()
        return block, weights

    def _metadata_views(
        self, block: torch.Tensor, num_compact: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Give token numbers, expanded rows and top-k numbers as views of their block."""
        plan = self.plan
        num_topk, num_entries = plan.num_topk, num_compact * plan.num_topk
        shape, strides = (num_compact, num_topk), (num_topk, 1)
        if plan.is_expanded:
            return block.as_strided((num_compact,), (1,), num_entries), block.as_strided(shape, strides), None
        src_token = block.view(torch.int32).as_strided((num_compact,), (1,), 2 * num_entries)
        return src_token, None, block.as_strided(shape, strides) if num_topk else None

    def _address(self, tensor: torch.Tensor | None) -> int:
        """Give where a contiguous tensor begins, or a copy of another one, which lives as long as this dispatch."""
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self.keep.append(tensor)
        return tensor.data_ptr()


def _as_kernels_take_it(request: DispatchRequest) -> DispatchRequest:
    """Kernels cast bf16 and read contiguous rows of 16 bytes each; the rest is brought into that form before."""
    if request.sf_format is not None and request.x.dtype != torch.bfloat16:
        x, sf = quant.fp8_cast(request.x, request.sf_format)
        return replace(request, x=x, sf=sf, sf_format=None)
    x = aligned(request.x)
    return request if x is request.x else replace(request, x=x)
