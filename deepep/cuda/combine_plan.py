"""What combines of one shape have in common, worked out once: rings, cuts, headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deepep.backends.base import CombineRequest, Layout, Reduction, WeightSource
from deepep.cuda import jit, kernels
from deepep.cuda.arguments import NO_ENTRY, NUM_AGREED, PASS_TOKENS, CombineArgs
from deepep.cuda.engine import Engine, place_in_window
from deepep.cuda.status import dtype_word, op_word
from deepep.cuda.window import NUM_FLAGS, NUM_PASSES
from deepep.errors import InvalidArgument
from deepep.layout import align

_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_NUM_STAGE_WARPS = 6
_NUM_SUM_WARPS = 12


@dataclass(frozen=True)
class CombinePlan:
    """A combine up to its addresses.

    Attributes:
        args: arguments with everything but addresses; copied for each call.
        spec: of the kernel.
        num_sms: multiprocessors to use.
        num_threads: of a CTA.
        smem: bytes of dynamic shared memory.
        num_topk: K of the weights that come home.
    """

    args: CombineArgs
    spec: jit.KernelSpec
    num_sms: int
    num_threads: int
    smem: int
    num_topk: int


def plan_of(engine: Engine, request: CombineRequest, x: torch.Tensor) -> CombinePlan:
    """Find the plan of a request whose rows are `x`, contiguous, or make it.

    Raises:
        InvalidArgument: the window is too small for the request; says what would do.
    """
    routing, weights = request.routing, request.topk_weights
    key: tuple[Any, ...] = (
        "combine", x.shape, x.dtype, place_in_window(engine, x), engine.ring_bytes, routing.layout, request.reduction,
        request.weight_source, request.num_sms, routing.num_experts, routing.dst_rank.shape,
        None if routing.topk_idx is None else routing.topk_idx.shape[1],
        None if routing.expanded_row is None else routing.expanded_row.shape[1],
        None if weights is None else weights.shape,
    )  # fmt: skip
    plan = engine.plans.get(key)
    if plan is None:
        with engine.refusing():
            plan = _plan(engine, request, x)
        engine.remember(key, plan)
    return plan


def _plan(engine: Engine, request: CombineRequest, x: torch.Tensor) -> CombinePlan:
    routing, has_weights = request.routing, request.topk_weights is not None
    is_expanded = routing.layout is Layout.EXPANDED
    is_per_copy = is_expanded and request.reduction is Reduction.PER_COPY
    sums = is_expanded and not is_per_copy
    num_tokens, num_slots = routing.dst_rank.shape
    num_topk = _num_topk(request)
    args = CombineArgs(window=engine.window)
    args.num_tokens, args.num_slots, args.num_topk = num_tokens, num_slots, num_topk
    args.num_local_experts = max(routing.num_experts // engine.num_ranks, 1)
    args.is_per_copy = is_per_copy
    args.is_owner_only = request.weight_source is WeightSource.OWNER and routing.topk_idx is not None
    row_bytes = x.shape[1] * x.element_size()
    _place_ring(engine, args, x, row_bytes, can_stay=not is_expanded, has_weights=has_weights)
    must_stage = not args.is_in_window or has_weights
    # Slots to copy through, for warps that do; sums go through registers.
    args.cut = kernels.cut_rows(row_bytes, 0, kernels.COPY_PIECE_BYTES, _NUM_STAGE_WARPS, engine.smem_bytes, "combine")
    args.cut.num_stage_warps = 0 if not must_stage else _NUM_SUM_WARPS if sums else args.cut.num_warps
    flags = (is_expanded, False, has_weights, routing.topk_idx is not None, is_per_copy, bool(args.is_owner_only))
    header = (op_word("combine", flags), routing.num_experts, num_slots, x.shape[1], dtype_word(x.dtype))
    args.header[:] = (*header, *(0,) * (NUM_AGREED - len(header)))
    smem = 0 if sums or not must_stage else kernels.pipe_bytes(args.cut)
    spec = kernels.COMBINE[_KINDS[x.dtype], sums]
    num_threads = 32 * kernels.COMBINE_WARPS[sums]
    return CombinePlan(args, spec, engine.num_sms(request.num_sms), num_threads, smem, num_topk)


def _num_topk(request: CombineRequest) -> int:
    routing = request.routing
    if routing.expanded_row is not None:
        return routing.expanded_row.shape[1]
    if request.topk_weights is not None:
        return request.topk_weights.shape[1]
    return 0 if routing.topk_idx is None else routing.topk_idx.shape[1]


def _place_ring(
    engine: Engine, args: CombineArgs, x: torch.Tensor, row_bytes: int, *, can_stay: bool, has_weights: bool
) -> None:
    """Divide the payload region into one ring per home, or find that rows can stay where they are."""
    payload, room = engine.window_map.payload, engine.ring_bytes
    args.weights_pitch = align(4 * args.num_topk, 16) if has_weights else 0
    copies = args.num_topk if args.is_per_copy else 1
    offset = engine.memory.offset_of(x) if can_stay and x.numel() else None
    staged = 0 if offset is not None and offset % 16 == 0 else row_bytes * copies
    slot = staged + args.weights_pitch
    ring = NUM_FLAGS if slot == 0 else min(room // (engine.num_ranks * slot), NUM_FLAGS)
    if ring < 2 * PASS_TOKENS:
        needed = engine.window_map.num_bytes + 2 * PASS_TOKENS * engine.num_ranks * slot - room
        raise InvalidArgument(
            f"combine: rows of {row_bytes * copies} bytes do not fit the window; build the buffer with num_nvl_bytes "
            f"of at least {needed}"
        )
    if args.num_tokens > PASS_TOKENS * NUM_PASSES:
        raise InvalidArgument(
            f"combine: {args.num_tokens} tokens; backend 'ipc' combines at most {PASS_TOKENS * NUM_PASSES} at a time"
        )
    args.ring_rows = min(ring, NO_ENTRY - 1)
    args.is_in_window = int(staged == 0)
    args.rows_offset = offset if staged == 0 and offset is not None else payload
    args.weights_offset = payload + engine.num_ranks * ring * staged
