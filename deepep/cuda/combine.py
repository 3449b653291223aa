"""Combine as one launch."""

from __future__ import annotations

import torch

from deepep.backends.base import CombineRequest, CombineResult, Layout, Reduction, WeightSource
from deepep.cuda import kernels
from deepep.cuda.arguments import NO_ENTRY, NUM_AGREED, PASS_TOKENS, CombineArgs
from deepep.cuda.engine import Engine
from deepep.cuda.status import dtype_word, op_word
from deepep.cuda.window import NUM_FLAGS, NUM_PASSES
from deepep.errors import InvalidArgument, UnsupportedOperation

_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_NUM_STAGE_WARPS = 6
_NUM_SUM_WARPS = 12


def combine(engine: Engine, request: CombineRequest) -> CombineResult:
    """Serve one combine request of compact or expanded rows."""
    engine.status.begin("combine")
    routing = request.routing
    if request.scale_topk_weights is not None or request.use_logfmt or request.split_phases:
        raise UnsupportedOperation(
            "combine: backend 'ipc' scales rows, casts them and splits phases in low-latency mode only; "
            "use backend='reference'"
        )
    x = _aligned(request.x)
    is_expanded = routing.layout is Layout.EXPANDED
    is_per_copy = is_expanded and request.reduction is Reduction.PER_COPY
    num_tokens, num_slots = routing.dst_rank.shape
    num_topk = 0 if routing.topk_idx is None else routing.topk_idx.shape[1]
    if routing.expanded_row is not None:
        num_topk = routing.expanded_row.shape[1]
    elif request.topk_weights is not None:
        num_topk = request.topk_weights.shape[1]
    args = CombineArgs(window=engine.window)
    args.num_tokens, args.num_slots, args.num_topk = num_tokens, num_slots, num_topk
    args.num_local_experts = max(routing.num_experts // engine.num_ranks, 1)
    args.is_per_copy = is_per_copy
    args.is_owner_only = request.weight_source is WeightSource.OWNER and routing.topk_idx is not None
    out = request.out
    if out is None:
        out = torch.empty((num_tokens, x.shape[1]), dtype=x.dtype, device=x.device)
    weights = None
    given = None if request.topk_weights is None else request.topk_weights.contiguous()
    if given is not None:
        weights = torch.empty((num_tokens, num_topk), dtype=torch.float32, device=x.device)
        args.topk_weights, args.out_weights = given.data_ptr(), weights.data_ptr()
    biases = [_aligned(bias) for bias in request.bias]
    for name, bias in zip(("bias0", "bias1"), biases, strict=False):
        setattr(args, name, bias.data_ptr())
    _point_to_routing(args, request)
    args.x, args.out = x.data_ptr(), out.data_ptr()
    row_bytes = x.shape[1] * x.element_size()
    sums = is_expanded and not is_per_copy
    _place_ring(engine, args, x, row_bytes, can_stay=not is_expanded, has_weights=given is not None)
    must_stage = not args.is_in_window or given is not None
    # Slots to copy through, for warps that do; sums go through registers.
    args.cut = kernels.cut_rows(row_bytes, 0, kernels.COPY_PIECE_BYTES, _NUM_STAGE_WARPS, engine.smem_bytes, "combine")
    args.cut.num_stage_warps = 0 if not must_stage else _NUM_SUM_WARPS if sums else args.cut.num_warps
    flags = (
        is_expanded, False, given is not None, routing.topk_idx is not None, is_per_copy, bool(args.is_owner_only),
    )  # fmt: skip
    header = (op_word("combine", flags), routing.num_experts, num_slots, x.shape[1], dtype_word(x.dtype))
    args.header[:] = (*header, *(0,) * (NUM_AGREED - len(header)))
    if request.wait_recv_cost_stats is not None:
        args.wait_stats = request.wait_recv_cost_stats.data_ptr()
    num_sms = engine.num_sms(request.num_sms)
    engine.prepare(args.window, routing.num_experts)
    smem = 0 if sums or not must_stage else kernels.pipe_bytes(args.cut)
    engine.launch(kernels.COMBINE[_KINDS[x.dtype], sums], num_sms, 32 * kernels.COMBINE_WARPS[sums], smem, args)
    return CombineResult(out, weights)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor contiguous and its address a multiple of 16, by a copy if need be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _point_to_routing(args: CombineArgs, request: CombineRequest) -> None:
    routing = request.routing
    args.dst_rank, args.dst_row = routing.dst_rank.data_ptr(), routing.dst_row.data_ptr()
    args.psum_ranks = routing.psum_num_recv_tokens_per_rank.data_ptr()
    args.recv_src_token = routing.recv_src_token.data_ptr()
    if routing.topk_idx is not None:
        args.topk_idx = routing.topk_idx.data_ptr()
    if routing.expanded_row is not None:
        args.expanded_row = routing.expanded_row.data_ptr()


def _place_ring(
    engine: Engine, args: CombineArgs, x: torch.Tensor, row_bytes: int, *, can_stay: bool, has_weights: bool
) -> None:
    """Divide the payload region into one ring per home, or find that rows can stay where they are."""
    payload, room = engine.window_map.payload, engine.ring_bytes
    args.weights_pitch = kernels.align_up(4 * args.num_topk, 16) if has_weights else 0
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
