"""Combine as one launch."""

from __future__ import annotations

import torch

from deepep.backends.base import CombineRequest, CombineResult
from deepep.cuda.arguments import CombineArgs, write_combine
from deepep.cuda.combine_plan import plan_of
from deepep.cuda.engine import Engine
from deepep.cuda.launch import aligned, pointer
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
    biases = [aligned(bias) for bias in request.bias]
    bias0, bias1 = (*biases, None, None)[:2]
    write_combine(
        args, CombineArgs.x.offset, x.data_ptr(), pointer(given), out.data_ptr(), pointer(weights), pointer(bias0),
        pointer(bias1), pointer(routing.topk_idx), routing.dst_rank.data_ptr(), routing.dst_row.data_ptr(),
        routing.psum_num_recv_tokens_per_rank.data_ptr(), routing.recv_src_token.data_ptr(),
        pointer(routing.expanded_row),
    )  # fmt: skip
    if request.wait_recv_cost_stats is not None:
        args.wait_stats = request.wait_recv_cost_stats.data_ptr()
    stream = engine.prepare(args.window, routing.num_experts)
    engine.launch(plan.spec, plan.num_sms, plan.num_threads, plan.smem, args, stream)
    return CombineResult(out, weights)
