"""Dispatch as launches: notify, the wait for counts where shapes are exact, and the kernel that fetches rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from deepep import quant
from deepep.backends.base import DispatchRequest, DispatchResult, Layout, Routing
from deepep.cuda import kernels
from deepep.cuda.arguments import FLAG_ROWS, MAX_TOPK, NO_ENTRY, POSITION_BITS, Cut, DispatchArgs, HostWord
from deepep.cuda.engine import Engine
from deepep.cuda.status import dtype_word, op_word
from deepep.cuda.window import MAX_LOCAL_EXPERTS, NUM_FLAGS, NUM_PASSES, metadata_row_bytes
from deepep.errors import InvalidArgument
from deepep.layout import align, num_expanded_rows_at_most

_SF_FORMATS = {quant.SfFormat.FLOAT32: 1, quant.SfFormat.POW2: 2, quant.SfFormat.UE8M0: 3}
_NUM_STAGE_WARPS = 4


@dataclass(frozen=True)
class Sent:
    """What a fresh exact dispatch remembers for statistics: rows sent to each rank."""

    num_rows: tuple[int, ...]


def dispatch(engine: Engine, request: DispatchRequest) -> DispatchResult:
    """Serve one dispatch request into compact or expanded rows."""
    engine.status.begin("dispatch")
    request = _moved_by_kernels(request)
    return _Dispatch(engine, request).run()


class _Dispatch:
    """One dispatch under way."""

    def __init__(self, engine: Engine, request: DispatchRequest) -> None:
        self.engine, self.request = engine, request
        self.device = request.x.device
        routing = request.routing
        self.num_tokens = request.x.shape[0]
        self.num_topk = 0 if request.topk_idx is None else request.topk_idx.shape[1]
        # A known routing that must bring top-k along is worked out again: its places are the same.
        is_known = routing is not None
        brings_topk = self.num_topk > 0 and (request.layout is Layout.COMPACT or request.topk_weights is not None)
        self.is_cached = is_known and not brings_topk
        self.is_exact = request.num_worst_rows is None and not is_known
        self.num_slots = self.num_topk or engine.num_ranks
        if routing is not None and self.is_cached:
            self.num_slots = routing.dst_rank.shape[1]
        self.is_expanded = request.layout is Layout.EXPANDED
        self.num_sms = engine.num_sms(request.num_sms)
        self.num_local = request.num_experts // engine.num_ranks
        self.args = DispatchArgs(window=engine.window)
        self.keep: list[torch.Tensor] = []

    def run(self) -> DispatchResult:
        """Do it."""
        self._check()
        self._describe_source()
        self._describe_header()
        routing = self._known_routing() if self.is_cached else self._fresh_routing()
        if not self.is_cached:
            self._notify()
        if self.is_exact:
            routing = self._with_counts(routing)
        return self._pull(routing)

    def _check(self) -> None:
        limit = int(self.engine.window.metadata_bytes) // metadata_row_bytes(self.num_topk) & ~3
        if self.num_topk > MAX_TOPK or self.num_local > MAX_LOCAL_EXPERTS:
            raise InvalidArgument(
                f"dispatch: num_topk is {self.num_topk} and experts per rank are {self.num_local}; backend 'ipc' "
                f"takes at most {MAX_TOPK} and {MAX_LOCAL_EXPERTS}"
            )
        if not self.is_cached and self.num_tokens > min(limit, 1 << POSITION_BITS):
            needed = 16 * self.engine.num_ranks * metadata_row_bytes(self.num_topk) * (self.num_tokens + 4)
            raise InvalidArgument(
                f"dispatch: the window holds the routing of {limit} tokens and there are {self.num_tokens}; build the "
                f"buffer with num_nvl_bytes of at least {needed}"
            )
        self.args.metadata_rows = limit

    def _describe_source(self) -> None:
        """Where rows come from, and where those that other ranks fetch are published."""
        engine, request, args = self.engine, self.request, self.args
        x, sf = request.x, request.sf
        args.hidden = x.shape[1]
        args.num_tokens, args.num_slots, args.num_topk = self.num_tokens, self.num_slots, self.num_topk
        args.num_experts = request.num_experts
        row_bytes = x.shape[1] * x.element_size()
        if request.sf_format is not None:
            row_bytes = x.shape[1]
            args.sf_format = _SF_FORMATS[request.sf_format]
            args.num_sf = x.shape[1] // (512 if args.sf_format == 3 else quant.GROUP_SIZE)
        elif sf is not None:
            args.num_sf = sf.shape[1]
            args.sf, args.sf_stride_token, args.sf_stride_column = sf.data_ptr(), sf.stride(0), sf.stride(1)
            is_aligned = args.num_sf % 4 == 0 and args.sf % 16 == 0 and sf.stride(0) % 4 == 0
            args.sf_is_bulk = is_aligned and sf.stride(1) == 1 and args.num_sf > 0
        if x.data_ptr() % 16:
            x = x.clone()
            self.keep.append(x)
        args.x = x.data_ptr()
        args.recv_sf_is_bulk = args.num_sf % 4 == 0
        args.sf_pitch = kernels.align_up(4 * args.num_sf, 16)
        args.cut = kernels.cut_rows(
            row_bytes, args.sf_pitch, kernels.DISPATCH_PIECE_BYTES, kernels.MAX_DISPATCH_WARPS, engine.smem_bytes,
            "dispatch",
        )  # fmt: skip
        self._place_rows(x, row_bytes)

    def _place_rows(self, x: torch.Tensor, row_bytes: int) -> None:
        engine, args = self.engine, self.args
        payload, room = engine.window_map.payload, engine.ring_bytes
        offset = engine.memory.offset_of(x) if self.num_tokens and args.sf_format == 0 else None
        fits = self.num_tokens <= FLAG_ROWS * NUM_FLAGS and self.num_tokens * args.sf_pitch <= room
        if offset is not None and offset % 16 == 0 and fits:
            args.is_in_window, args.ring_rows = 1, NO_ENTRY
            args.rows_offset, args.sf_offset = offset, payload
            return
        most = kernels.align_up(max(self.num_tokens, 1), FLAG_ROWS)
        ring = min(most, room // (row_bytes + args.sf_pitch) & ~(FLAG_ROWS - 1), FLAG_ROWS * NUM_FLAGS)
        if ring < FLAG_ROWS or self.num_tokens > ring * NUM_PASSES:
            needed = engine.window_map.num_bytes - room + max(FLAG_ROWS, self.num_tokens // NUM_PASSES) * row_bytes * 2
            raise InvalidArgument(
                f"dispatch: rows of {row_bytes} bytes do not fit the window; build the buffer with num_nvl_bytes of "
                f"at least {needed}"
            )
        args.ring_rows = ring
        args.rows_offset, args.sf_offset = payload, payload + ring * row_bytes

    def _describe_header(self) -> None:
        request, args = self.request, self.args
        flags = (self.is_expanded, self.is_cached, request.topk_weights is not None, self.num_topk > 0)
        sf_dtype = None if request.sf is None else request.sf.dtype
        args.header[:] = (
            op_word("dispatch", flags), request.num_experts, self.num_slots, args.hidden,
            dtype_word(request.x.dtype, sf_dtype), args.num_sf | args.sf_format << 24,
            request.num_max_tokens_per_rank,
        )  # fmt: skip
        args.is_cached, args.is_exact, args.is_expanded = self.is_cached, self.is_exact, self.is_expanded
        args.alignment = request.expert_alignment
        args.room = NO_ENTRY if self.is_exact else self._num_compact_rows()
        self.engine.prepare(args.window, request.num_experts)
        if request.wait_recv_cost_stats is not None:
            args.wait_stats = request.wait_recv_cost_stats.data_ptr()
        chunks = -(-self.num_tokens // FLAG_ROWS)
        must_stage = not args.is_in_window or args.num_sf > 0
        if must_stage and not self.is_cached and (self.is_exact or self.engine.ranks_per_gpu > 1):
            args.num_early_chunks = min(chunks, args.ring_rows // FLAG_ROWS)
        args.cut.num_stage_warps = 0
        if must_stage and args.num_early_chunks < chunks:
            args.cut.num_stage_warps = min(_NUM_STAGE_WARPS, args.cut.num_warps - 1)

    def _num_compact_rows(self) -> int:
        """Compact rows where they are not counted first."""
        request = self.request
        if request.routing is not None:
            return request.routing.num_recv_tokens
        if request.layout is Layout.COMPACT and request.num_worst_rows is not None:
            return request.num_worst_rows
        return self.engine.num_ranks * request.num_max_tokens_per_rank

    def _known_routing(self) -> Routing:
        routing, args = self.request.routing, self.args
        if routing is None:
            raise TypeError("a cached dispatch needs a routing")
        args.psum_ranks = routing.psum_num_recv_tokens_per_rank.data_ptr()
        args.recv_src_token = routing.recv_src_token.data_ptr()
        if routing.expanded_row is not None:
            args.expanded_row = routing.expanded_row.data_ptr()
            args.num_topk = routing.expanded_row.shape[1]
        return routing

    def _int32(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.device)

    def _fresh_routing(self) -> Routing:
        """Allocate what notify writes; sizes that depend on counts come later."""
        request, args, num_ranks = self.request, self.args, self.engine.num_ranks
        dst_rank, dst_row = self._int32(self.num_tokens, self.num_slots), self._int32(self.num_tokens, self.num_slots)
        psum = self._int32(num_ranks)
        self.counts = self._int32(self.num_local)
        self.matrix = self._int32(num_ranks, num_ranks) if not self.is_expanded else None
        args.dst_rank, args.dst_row, args.psum_ranks = dst_rank.data_ptr(), dst_row.data_ptr(), psum.data_ptr()
        args.counts_out = self.counts.data_ptr()
        if self.matrix is not None:
            args.rank_prefix_matrix = self.matrix.data_ptr()
        for name in ("topk_idx", "topk_weights", "is_token_in_rank"):
            self._point(name, getattr(request, name))
        self._point("tokens_per_expert", request.num_tokens_per_expert)
        self._point("stats", request.cumulative_local_expert_recv_stats if request.routing is None else None)
        num_compact = 0 if self.is_exact else self._num_compact_rows()
        num_rows = num_compact
        if self.is_expanded and not self.is_exact:
            num_rows = num_expanded_rows_at_most(num_compact, self.num_topk, self.num_local, request.expert_alignment)
            if request.routing is not None:
                num_rows = request.routing.num_rows
        args.num_compact_rows, args.num_rows = num_compact, num_rows
        return Routing(
            request.layout, request.num_experts, request.num_max_tokens_per_rank, request.expert_alignment,
            num_compact, num_rows, request.topk_idx, dst_rank, dst_row, psum, psum,
        )  # fmt: skip

    def _point(self, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None:
            return
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self.keep.append(tensor)
        setattr(self.args, name, tensor.data_ptr())

    def _notify(self) -> None:
        args, engine = self.args, self.engine
        num_ranks = engine.num_ranks
        columns = (args.num_experts if self.num_topk else 0) + num_ranks
        exchange = 4 * (num_ranks * (16 + num_ranks) + args.num_experts)
        walkers = max(1, min(kernels.MAX_WALKERS, engine.smem_bytes // 4 // (4 * columns)))
        counting = kernels.align_up(max(walkers * columns * 4, exchange), 128)
        if counting > engine.smem_bytes // 2:
            raise InvalidArgument(f"dispatch: {args.num_experts} experts are too many for this GPU's shared memory")
        pull_cut = Cut.from_buffer_copy(args.cut)  # a member is a view: take it out before it is replaced
        args.num_walkers = walkers
        args.cut = kernels.cut_rows(
            pull_cut.row_bytes, args.sf_pitch, kernels.DISPATCH_PIECE_BYTES, kernels.MAX_STAGE_WARPS,
            engine.smem_bytes - counting, "dispatch",
        )  # fmt: skip
        threads = 32 * (walkers + args.cut.num_warps)
        engine.launch(kernels.NOTIFY, self.num_sms, threads, kernels.pipe_bytes(args.cut) + counting, args)
        args.cut = pull_cut

    def _with_counts(self, routing: Routing) -> Routing:
        """Wait for the counts and size everything exactly."""
        engine, request = self.engine, self.request
        engine.wait_counts()
        first, num_ranks = HostWord.MISSING + engine.num_ranks, engine.num_ranks
        page = (engine.words.host[first : first + 1 + num_ranks + self.num_local] & 0xFFFFFFFF).tolist()
        num_tokens = int(page[0])
        self.sent = tuple(page[1 : 1 + num_ranks])
        self.aligned = [align(count, request.expert_alignment) for count in page[1 + num_ranks :]]
        num_rows = sum(self.aligned) if self.is_expanded else num_tokens
        self.args.num_compact_rows, self.args.num_rows = num_tokens, num_rows
        return replace(routing, num_recv_tokens=num_tokens, num_rows=num_rows, private=Sent(self.sent))

    def _pull(self, routing: Routing) -> DispatchResult:
        """Allocate what is received and fetch it."""
        request, args = self.request, self.args
        num_compact, num_rows = routing.num_recv_tokens, routing.num_rows
        # A cached dispatch does not know where rows are missing, so it clears everything.
        make = torch.zeros if self.is_cached and self.is_expanded and request.do_zero_padding else torch.empty
        args.do_zero_padding = request.do_zero_padding and self.is_expanded and not self.is_cached
        dtype = quant.FP8_DTYPE if request.sf_format is not None else request.x.dtype
        recv_x = make((num_rows, args.hidden), dtype=dtype, device=self.device)
        args.recv_x = recv_x.data_ptr()
        recv_sf, idx, weights = None, None, None
        if args.num_sf or request.sf is not None:
            sf_dtype = request.sf_format.dtype if request.sf is None and request.sf_format else None
            sf_dtype = sf_dtype or (torch.float32 if request.sf is None else request.sf.dtype)
            recv_sf = make((num_rows, args.num_sf), dtype=sf_dtype, device=self.device)
            args.recv_sf = recv_sf.data_ptr()
        if not self.is_cached:
            src_token = self._int32(num_compact)
            args.recv_src_token = src_token.data_ptr()
            expanded_row = None
            if self.is_expanded:
                expanded_row = self._int32(num_compact, self.num_topk)
                args.expanded_row = expanded_row.data_ptr()
            elif self.num_topk:
                idx = torch.empty((num_compact, self.num_topk), dtype=torch.int64, device=self.device)
                args.recv_topk_idx = idx.data_ptr()
            if request.topk_weights is not None:
                shape = (num_rows,) if self.is_expanded else (num_compact, self.num_topk)
                weights = torch.empty(shape, dtype=torch.float32, device=self.device)
                args.recv_topk_weights = weights.data_ptr()
            routing = replace(routing, recv_src_token=src_token, expanded_row=expanded_row)
        spec = kernels.DISPATCH_EXPANDED if self.is_expanded else kernels.DISPATCH_COMPACT
        threads = 32 * (args.cut.num_warps + kernels.NUM_CLERK_WARPS)
        self.engine.launch(spec, self.num_sms, threads, kernels.pipe_bytes(args.cut), args)
        if request.routing is not None:
            return DispatchResult(recv_x, recv_sf, idx, weights, None, [], request.routing)
        counts = self.aligned if self.is_exact else []
        return DispatchResult(
            recv_x, recv_sf, idx, weights, self.counts, counts, routing, rank_prefix_matrix=self.matrix
        )


def _moved_by_kernels(request: DispatchRequest) -> DispatchRequest:
    """Kernels cast bf16; other floats are cast before."""
    if request.sf_format is None or request.x.dtype == torch.bfloat16:
        return request if request.x.is_contiguous() else replace(request, x=request.x.contiguous())
    x, sf = quant.fp8_cast(request.x, request.sf_format)
    return replace(request, x=x, sf=sf, sf_format=None)
