"""What dispatches of one shape have in common, worked out once: sizes, cuts, the place of rows in the window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from deepep import quant
from deepep.backends.base import DispatchRequest, Layout
from deepep.cuda import kernels
from deepep.cuda.arguments import FLAG_ROWS, MAX_TOPK, NO_ENTRY, POSITION_BITS, Cut, DispatchArgs
from deepep.cuda.engine import Engine, place_in_window
from deepep.cuda.status import dtype_word, op_word
from deepep.cuda.window import MAX_LOCAL_EXPERTS, NUM_FLAGS, NUM_PASSES, metadata_row_bytes
from deepep.errors import InvalidArgument
from deepep.layout import align, num_expanded_rows_at_most

_SF_FORMATS = {quant.SfFormat.FLOAT32: 1, quant.SfFormat.POW2: 2, quant.SfFormat.UE8M0: 3}
_NUM_STAGE_WARPS = 4
_NUM_STAGE_WARPS_CACHED = 7
_PART_ALIGNMENT = 32  # int32 elements, a cache line


class Parts(NamedTuple):
    """Where each tensor that notify writes begins in their common block, in int32 elements; `dst_rank` is the first."""

    dst_row: int
    psum: int
    counts: int
    psum_experts: int
    matrix: int
    end: int


@dataclass(frozen=True)
class Plan:
    """A dispatch up to its addresses.

    Attributes:
        args: arguments with everything but addresses; copied for each call.
        notify_cut: of notify, whose warps share memory with counters.
        notify_smem: bytes of dynamic shared memory of notify.
        pull_smem: the same of the kernel that fetches.
        num_sms: of both.
        num_topk: K, 0 without top-k.
        num_slots: S.
        num_local_experts: L.
        is_cached: rows follow a known routing and nothing else travels.
        is_exact: the CPU waits for counts and sizes everything exactly.
        is_expanded: layout of the rows.
        num_compact_rows: compact rows to allocate where they are not counted first.
        num_rows: rows of the result, likewise.
        recv_dtype: of the received payload.
        sf_dtype: of the received scale factors, or None.
        row_bytes: of one row on the way, scale factors included.
        copied: bytes of rows, and of scale factors, that are copied into the window before they are fetched.
        parts: of the block that holds what notify writes.
        notify_threads: of a CTA of notify.
        pull_threads: of a CTA of the kernel that fetches.
    """

    args: DispatchArgs
    notify_cut: Cut
    notify_smem: int
    pull_smem: int
    num_sms: int
    num_topk: int
    num_slots: int
    num_local_experts: int
    is_cached: bool
    is_exact: bool
    is_expanded: bool
    num_compact_rows: int
    num_rows: int
    recv_dtype: torch.dtype
    sf_dtype: torch.dtype | None
    row_bytes: int
    copied: tuple[int, int]
    parts: Parts
    notify_threads: int
    pull_threads: int


def plan_of(engine: Engine, request: DispatchRequest) -> Plan:
    """Find the plan of a request, or make it.

    Raises:
        InvalidArgument: the window, or this GPU, is too small for the request; says what would do.
    """
    x, sf, topk_idx, routing = request.x, request.sf, request.topk_idx, request.routing
    key: tuple[Any, ...] = (
        x.shape, x.dtype, request.layout, request.num_experts, request.num_sms, request.expert_alignment,
        request.num_max_tokens_per_rank, request.num_worst_rows, request.do_zero_padding, request.sf_format,
        place_in_window(engine, x), engine.ring_bytes,
        None if sf is None else (sf.shape[1], sf.dtype, sf.stride(), sf.data_ptr() % 16),
        None if topk_idx is None else topk_idx.shape[1], request.topk_weights is not None,
        None if routing is None else (routing.num_recv_tokens, routing.num_rows, routing.dst_rank.shape[1]),
    )  # fmt: skip
    plan = engine.plans.get(key)
    if plan is None:
        with engine.refusing():
            plan = _Planner(engine, request).plan()
        engine.remember(key, plan)
    return plan


class _Planner:
    """Makes one plan."""

    def __init__(self, engine: Engine, request: DispatchRequest) -> None:
        self.engine, self.request = engine, request
        routing = request.routing
        self.num_tokens, self.hidden = request.x.shape
        self.num_topk = 0 if request.topk_idx is None else request.topk_idx.shape[1]
        # A known routing that must bring top-k along is worked out again: its places are the same.
        brings_topk = self.num_topk > 0 and (request.layout is Layout.COMPACT or request.topk_weights is not None)
        self.is_cached = routing is not None and not brings_topk
        self.is_exact = request.num_worst_rows is None and routing is None
        self.num_slots = self.num_topk or engine.num_ranks
        if routing is not None and self.is_cached:
            self.num_slots = routing.dst_rank.shape[1]
        self.is_expanded = request.layout is Layout.EXPANDED
        self.num_local = request.num_experts // engine.num_ranks
        self.args = DispatchArgs(window=engine.window)
        self.copied = (0, 0)

    def plan(self) -> Plan:
        request, args, engine = self.request, self.args, self.engine
        self._check()
        self._describe_payload()
        self._describe_header()
        num_compact, num_rows = (0, 0) if self.is_exact else self._worst_rows()
        args.num_compact_rows, args.num_rows = num_compact, num_rows
        args.do_zero_padding = request.do_zero_padding and self.is_expanded and not self.is_cached
        self._divide_staging()
        notify_cut, notify_smem = self._divide_notify()
        is_cast = request.sf_format is not None
        sf_dtype = request.sf_format.dtype if request.sf_format else None if request.sf is None else request.sf.dtype
        return Plan(
            args, notify_cut, notify_smem, kernels.pipe_bytes(args.cut), engine.num_sms(request.num_sms),
            self.num_topk, self.num_slots, self.num_local, self.is_cached, self.is_exact, self.is_expanded,
            num_compact, num_rows, quant.FP8_DTYPE if is_cast else request.x.dtype, sf_dtype,
            int(args.cut.row_bytes) + 4 * int(args.num_sf), self.copied,
            self._parts(), 32 * int(args.num_walkers + notify_cut.num_warps),
            32 * int(args.cut.num_warps + kernels.NUM_CLERK_WARPS),
        )  # fmt: skip

    def _parts(self) -> Parts:
        num_ranks = self.engine.num_ranks
        num_matrix = 0 if self.is_expanded else num_ranks * num_ranks
        places, at = [], 0
        for size in (*(self.num_tokens * self.num_slots,) * 2, num_ranks, self.num_local, self.num_local, num_matrix):
            at = align(at + size, _PART_ALIGNMENT)
            places.append(at)
        return Parts(*places)

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

    def _describe_payload(self) -> None:
        """How wide rows are, and where those that other ranks fetch are published."""
        request, args = self.request, self.args
        x, sf = request.x, request.sf
        args.hidden, args.num_tokens = self.hidden, self.num_tokens
        args.num_slots, args.num_topk, args.num_experts = self.num_slots, self.num_topk, request.num_experts
        row_bytes = self.hidden * x.element_size()
        if request.sf_format is not None:
            row_bytes = self.hidden
            args.sf_format = _SF_FORMATS[request.sf_format]
            args.num_sf = self.hidden // (512 if args.sf_format == 3 else quant.GROUP_SIZE)
        elif sf is not None:
            args.num_sf = sf.shape[1]
            args.sf_stride_token, args.sf_stride_column = sf.stride(0), sf.stride(1)
            is_aligned = args.num_sf % 4 == 0 and sf.data_ptr() % 16 == 0 and sf.stride(0) % 4 == 0
            args.sf_is_bulk = is_aligned and sf.stride(1) == 1 and args.num_sf > 0
        args.recv_sf_is_bulk = args.num_sf % 4 == 0
        args.sf_pitch = align(4 * args.num_sf, 16)
        args.cut = kernels.cut_rows(
            row_bytes, args.sf_pitch, kernels.DISPATCH_PIECE_BYTES, kernels.MAX_DISPATCH_WARPS,
            self.engine.smem_bytes, "dispatch",
        )  # fmt: skip
        self._place_rows(row_bytes)

    def _place_rows(self, row_bytes: int) -> None:
        engine, args = self.engine, self.args
        payload, room = engine.window_map.payload, engine.ring_bytes
        offset = engine.memory.offset_of(self.request.x) if self.num_tokens and args.sf_format == 0 else None
        fits = self.num_tokens <= FLAG_ROWS * NUM_FLAGS and self.num_tokens * args.sf_pitch <= room
        if offset is not None and offset % 16 == 0 and fits:
            args.is_in_window, args.is_in_place, args.ring_rows = 1, args.num_sf == 0, NO_ENTRY
            args.rows_offset, args.sf_offset = offset, payload
            return
        if self._copies(row_bytes, room):
            args.is_in_window, args.is_in_place, args.ring_rows = 1, 1, NO_ENTRY
            args.rows_offset, args.sf_offset = payload, payload + align(self.copied[0], 256)
            return
        most = align(max(self.num_tokens, 1), FLAG_ROWS)
        ring = min(most, room // (row_bytes + args.sf_pitch) & ~(FLAG_ROWS - 1), FLAG_ROWS * NUM_FLAGS)
        if ring < FLAG_ROWS or self.num_tokens > ring * NUM_PASSES:
            needed = engine.window_map.num_bytes - room + max(FLAG_ROWS, self.num_tokens // NUM_PASSES) * row_bytes * 2
            raise InvalidArgument(
                f"dispatch: rows of {row_bytes} bytes do not fit the window; build the buffer with num_nvl_bytes of "
                f"at least {needed}"
            )
        args.ring_rows = ring
        args.rows_offset, args.sf_offset = payload, payload + ring * row_bytes

    def _copies(self, row_bytes: int, room: int) -> bool:
        """Whether everything goes into the window in one piece, by the copy engine, so that kernels need not stage it.

        Not where the CPU waits for counts: kernels stage meanwhile, and have nothing else to do.
        """
        args, sf = self.args, self.request.sf
        if args.sf_format or not self.num_tokens:
            return False
        if self.engine.num_ranks == 1:
            return True  # nobody fetches it
        if self.is_exact:
            return False
        is_whole = sf is None or (bool(args.sf_is_bulk) and sf.is_contiguous())
        copied = (self.num_tokens * row_bytes, self.num_tokens * int(args.sf_pitch))
        if not is_whole or sum(copied) + 256 > room:
            return False
        self.copied = copied
        return True

    def _describe_header(self) -> None:
        """What ranks compare, and what they tell each other."""
        request, args = self.request, self.args
        flags = (self.is_expanded, self.is_cached, request.topk_weights is not None, self.num_topk > 0)
        sf_dtype = None if request.sf is None else request.sf.dtype
        args.header[:] = (
            op_word("dispatch", flags), request.num_experts, self.num_slots, self.hidden,
            dtype_word(request.x.dtype, sf_dtype), args.num_sf | args.sf_format << 24,
            request.num_max_tokens_per_rank,
        )  # fmt: skip
        args.is_cached, args.is_exact, args.is_expanded = self.is_cached, self.is_exact, self.is_expanded
        args.alignment = request.expert_alignment
        args.room = NO_ENTRY if self.is_exact else self._worst_rows()[0]

    def _worst_rows(self) -> tuple[int, int]:
        """Compact rows and rows of the result where they are not counted first."""
        request, routing = self.request, self.request.routing
        if routing is not None:
            return routing.num_recv_tokens, routing.num_rows
        if request.layout is Layout.COMPACT and request.num_worst_rows is not None:
            return request.num_worst_rows, request.num_worst_rows
        compact = self.engine.num_ranks * request.num_max_tokens_per_rank
        rows = num_expanded_rows_at_most(compact, self.num_topk, self.num_local, request.expert_alignment)
        return compact, rows

    def _divide_staging(self) -> None:
        """Stage in notify what its time is free for: everything, unless the link waits while the CPU does not."""
        args = self.args
        chunks = -(-self.num_tokens // FLAG_ROWS)
        if args.is_in_place:
            return
        if not self.is_cached:
            args.num_early_chunks = min(chunks, args.ring_rows // FLAG_ROWS)
            is_alone = self.engine.ranks_per_gpu == 1
            args.is_staging_shared = is_alone and not self.is_exact and args.num_early_chunks == chunks
        is_left = args.is_staging_shared or args.num_early_chunks < chunks
        wanted = _NUM_STAGE_WARPS_CACHED if self.is_cached else _NUM_STAGE_WARPS
        args.cut.num_stage_warps = min(wanted, args.cut.num_warps // 2) if is_left else 0

    def _divide_notify(self) -> tuple[Cut, int]:
        args, engine = self.args, self.engine
        num_ranks = engine.num_ranks
        columns = (args.num_experts if self.num_topk else 0) + num_ranks
        exchange = 4 * (num_ranks * (16 + num_ranks) + args.num_experts)
        walkers = max(1, min(kernels.MAX_WALKERS, engine.smem_bytes // 4 // (4 * columns)))
        counting = align(4 * walkers * columns + exchange, 128)
        if counting > engine.smem_bytes // 2:
            raise InvalidArgument(f"dispatch: {args.num_experts} experts are too many for this GPU's shared memory")
        args.num_walkers, args.num_counters = walkers, walkers * columns
        cut = kernels.cut_rows(
            int(args.cut.row_bytes), int(args.sf_pitch), kernels.DISPATCH_PIECE_BYTES, kernels.MAX_STAGE_WARPS,
            engine.smem_bytes - counting, "dispatch",
        )  # fmt: skip
        return cut, kernels.pipe_bytes(cut) + counting
