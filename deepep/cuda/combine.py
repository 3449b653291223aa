"""Combine as one launch."""

from __future__ import annotations

import torch

from deepep.backends.base import CombineRequest, CombineResult
from deepep.cuda.arguments import CombineArgs
from deepep.cuda.combine_plan import plan_of
from deepep.cuda.engine import Engine
from deepep.cuda.launch import aligned
from deepep.cuda.like import empty
from deepep.errors import UnsupportedOperation


def combine(engine: Engine, request: CombineRequest) -> CombineResult:
    """Serve one combine request of compact or expanded rows."""
    engine.status.begin("combine")
    routing = request.routing
    if request.scale_topk_weights is not None or request.use_logfmt or request.split_phases:
        raise UnsupportedOperation(
            "combine: backend 'ipc' scales rows, casts them and splits phases in low-latency mode only; "
            "use backend='reference'"
        )
    x = aligned(request.x)
    plan = plan_of(engine, request, x)
    args = CombineArgs.from_buffer_copy(plan.args)
    num_tokens = routing.dst_rank.shape[0]
    out = request.out
    if out is None:
        out = empty((num_tokens, x.shape[1]), x.dtype, x.device)
    given, weights = request.topk_weights, None
    if given is not None:
        given = given.contiguous()
        weights = empty((num_tokens, plan.num_topk), torch.float32, x.device)
        args.topk_weights, args.out_weights = given.data_ptr(), weights.data_ptr()
    biases = [aligned(bias) for bias in request.bias]
    for name, bias in zip(("bias0", "bias1"), biases, strict=False):
        setattr(args, name, bias.data_ptr())
    _point_to_routing(args, request)
    args.x, args.out = x.data_ptr(), out.data_ptr()
    if request.wait_recv_cost_stats is not None:
        args.wait_stats = request.wait_recv_cost_stats.data_ptr()
    engine.prepare(args.window, routing.num_experts)
    engine.launch(plan.spec, plan.num_sms, plan.num_threads, plan.smem, args)
    return CombineResult(out, weights)


def _point_to_routing(args: CombineArgs, request: CombineRequest) -> None:
    routing = request.routing
    args.dst_rank, args.dst_row = routing.dst_rank.data_ptr(), routing.dst_row.data_ptr()
    args.psum_ranks = routing.psum_num_recv_tokens_per_rank.data_ptr()
    args.recv_src_token = routing.recv_src_token.data_ptr()
    if routing.topk_idx is not None:
        args.topk_idx = routing.topk_idx.data_ptr()
    if routing.expanded_row is not None:
        args.expanded_row = routing.expanded_row.data_ptr()
