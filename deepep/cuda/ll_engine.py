"""Low-latency dispatch and combine as kernel launches over a symmetric window; transports share it.

Everything a call needs travels in its argument struct, and all that changes from call to call (epochs, banks, counts)
lives on the device, so launches can be captured in CUDA graphs and mixed with eager calls.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Protocol

import torch

from deepep.backends.base import (
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    Layout,
    Reduction,
    Routing,
)
from deepep.cuda import driver, jit, ll_structs
from deepep.cuda.call_order import CallOrder
from deepep.cuda.launch import aligned, runtime
from deepep.cuda.ll_grid import Grids
from deepep.cuda.ll_plan import CombinePlan, DispatchPlan
from deepep.cuda.ll_state import LlRouting, identity
from deepep.cuda.ll_structs import Division, LlCleanArgs, LlCombineArgs, LlCommon, LlDispatchArgs, LlShape, Shape, magic
from deepep.errors import BufferDestroyed, InvalidArgument
from deepep.stream import tensors_in

_MOST_PLANS = 256


class Window(Protocol):
    """Symmetric memory as the engine sees it."""

    @property
    def peer_table(self) -> int:
        """Device address of every rank's base address."""

    @property
    def base(self) -> int:
        """Address of this rank's first byte."""


@dataclass(frozen=True)
class Settings:
    """What an engine is made for.

    Attributes:
        shape: sizes all ranks agree on.
        rank: this rank.
        device: index of its GPU.
        ranks_per_gpu: how many ranks share that GPU.
        status_address: pinned words where kernels report ranks that they lost.
        timeout: after how long they do, seconds.
        is_shrinkable: mask such a rank instead.
    """

    shape: Shape
    rank: int
    device: int
    ranks_per_gpu: int
    status_address: int
    timeout: float
    is_shrinkable: bool


class LowLatencyEngine:
    """Launches of one window, divided for one shape. A change of shape makes a new one over cleaned memory."""

    def __init__(self, window: Window, division: Division, settings: Settings, order: CallOrder | None = None) -> None:
        shape, device = settings.shape, settings.device
        self.shape = shape
        self.division = division
        self.device = device
        self._order = order or CallOrder()
        self.is_over = False  # its window is divided otherwise by now, or gone
        self._dispatch_kernel, self._combine_kernel, self._clean_kernel = (
            jit.load(spec, device) for spec in shape.kernels
        )
        self._grids = Grids(shape, device, settings.ranks_per_gpu, self._dispatch_kernel, self._combine_kernel)
        self._common = LlCommon(
            peer_table=window.peer_table,
            own_base=window.base,
            window=division.window,
            status=settings.status_address,
            timeout_ns=int(settings.timeout * 1e9),
            is_shrinkable=int(settings.is_shrinkable),
        )
        self._common.shape = LlShape(
            rank=settings.rank,
            num_ranks=shape.num_ranks,
            num_experts=shape.num_experts,
            num_local_experts=shape.num_local_experts,
            num_topk=shape.num_topk,
            hidden=shape.hidden,
            num_max_tokens=shape.num_max_tokens,
            num_slots=shape.num_slots,
            slot_bytes=shape.slot_bytes,
            choice_offset=shape.choice_offset,
            local_experts_magic=magic(shape.num_local_experts),
            ranks_magic=magic(shape.num_ranks),
            others_magic=magic(shape.num_ranks - 1),
        )
        self._runtime = runtime()
        self._starts_early = driver.can_start_early(device)
        self._empty: dict[int, torch.Tensor] = {}
        kept = functools.lru_cache(_MOST_PLANS)
        self._plan_dispatch = kept(functools.partial(DispatchPlan.make, shape, self._grids, self._common))
        self._plan_combine = kept(functools.partial(CombinePlan.make, self._grids, self._common))

    def meet(self) -> None:
        """Let the current stream go on when all ranks that are not masked have come here."""
        self._launch_clean(is_barrier=True)

    def reset(self, then_meet: bool) -> None:
        """Bring the state back to its beginning, all behind it being zeros by now; on the current stream."""
        self._launch_clean(is_barrier=then_meet, resets=True)

    def _launch_clean(self, is_barrier: bool, resets: bool = False) -> None:
        args = LlCleanArgs(common=self._common, is_barrier=int(is_barrier), resets=int(resets))
        self._launch(self._clean_kernel.handle, 1, 0, args)

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Serve a padded dispatch request."""
        shape, x = self.shape, aligned(request.x)
        num_local, room = shape.num_local_experts, shape.num_ranks * shape.num_max_tokens
        num_tokens = x.shape[0]
        plan = self._plan_dispatch(num_tokens, request.num_sms, request.sf_format, request.split_phases, x.device)
        parts = plan.parts
        state, recv_x = torch.empty_like(plan.state), torch.empty_like(plan.recv_x)
        args, at = plan.args, state.data_ptr()
        args.x, args.recv_x = x.data_ptr(), recv_x.data_ptr()
        args.topk_idx, args.topk_weights = _pointer(request.topk_idx), _pointer(request.topk_weights)
        args.recv_count, args.src_info = at + 4 * parts.recv_count, at + 4 * parts.src_info
        args.layout_range = at + 4 * parts.layout_range
        args.recv_sf = 0 if plan.sf is None else at + 4 * parts.recv_sf
        args.recv_stats = _pointer(request.cumulative_local_expert_recv_stats)
        parts.address(at, plan.common)
        plan.common.wait_stats = _pointer(request.wait_recv_cost_stats)
        kernel, kept = self._dispatch_kernel.handle, (request, x, recv_x, state)
        finish = self._start(kernel, plan.num_blocks, self._grids.table_bytes, args, request.split_phases, kept)
        # Views are made while the kernel runs.
        return DispatchResult(
            x=recv_x,
            sf=None if plan.sf is None else plan.sf.of(state),
            topk_idx=None,
            topk_weights=None,
            num_recv_tokens_per_expert=state.as_strided((num_local,), (1,), parts.recv_count),
            num_recv_tokens_per_expert_list=[],
            routing=self._routing(request, LlRouting.of(request, state, parts, shape, num_tokens)),
            src_info=state.as_strided((num_local, room), (room, 1), parts.src_info),
            layout_range=state.view(torch.int64).as_strided(
                (num_local, shape.num_ranks), (shape.num_ranks, 1), parts.layout_range // 2
            ),
            finish=finish,
        )

    def combine(self, request: CombineRequest, x: torch.Tensor) -> CombineResult:
        """Serve a combine request of padded rows `x` [L, R*M, H]."""
        routing: LlRouting = request.routing.private
        is_per_copy, x = request.reduction is Reduction.PER_COPY, aligned(x)
        self._check_combine(request, routing, is_per_copy)
        plan = self._plan_combine(routing.num_tokens, request.num_sms, is_per_copy, request.split_phases, x.device)
        out = request.out
        if out is None:
            out = torch.empty_like(plan.out)
        epoch = torch.empty(1, dtype=torch.int32, device=x.device) if request.split_phases else None
        args = plan.args
        args.x, args.out, args.combine_epoch = x.data_ptr(), out.data_ptr(), _pointer(epoch)
        args.topk_idx, args.topk_weights = _pointer(request.scale_topk_idx), _pointer(request.scale_topk_weights)
        args.use_logfmt, args.has_sent_weights = request.use_logfmt, routing.sent is not None
        routing.parts.address(routing.state.data_ptr(), plan.common)
        plan.common.wait_stats = _pointer(request.wait_recv_cost_stats)
        kernel, kept = self._combine_kernel.handle, (request, x, out, epoch)
        finish = self._start(kernel, plan.num_blocks, 0, args, request.split_phases, kept)
        return CombineResult(out, None, finish)

    def _check_combine(self, request: CombineRequest, routing: LlRouting, is_per_copy: bool) -> None:
        op = "low_latency_combine"
        if routing.sent is None or is_per_copy:
            return
        for name, tensor, sent in zip(
            ("topk_idx", "topk_weights"),
            (request.scale_topk_idx, request.scale_topk_weights),
            routing.sent,
            strict=True,
        ):
            if tensor is None or identity(tensor) != sent:
                raise InvalidArgument(
                    f"{op}: {name} is not the unchanged tensor that low_latency_dispatch got; since its topk_weights= "
                    "sent the weights ahead, pass the same tensors, or dispatch without topk_weights"
                )

    def _start(
        self,
        kernel: int,
        num_blocks: int,
        smem: int,
        args: LlDispatchArgs | LlCombineArgs,
        in_two_phases: bool,
        kept: tuple[object, ...],
    ) -> _SecondPhase | None:
        """Launch both phases, or the first one and give back what launches the second."""
        stream = self._launch(kernel, num_blocks, smem, args)
        if not in_two_phases:
            return None
        args = type(args).from_buffer_copy(args)
        args.common.phases = ll_structs.RECV
        return _SecondPhase(self, kernel, num_blocks, smem, args, stream, kept)

    def _launch(self, kernel: int, num_blocks: int, smem: int, args: ctypes.Structure) -> int:
        """Launch on the current stream, and give its handle."""
        driver.ensure_context(self.device)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        self._order.enter(stream)
        address = ctypes.addressof(args)
        self._runtime.launch(kernel, num_blocks, ll_structs.NUM_THREADS, smem, stream, address, pdl=self._starts_early)
        self._order.leave(stream)
        return stream

    def _routing(self, request: DispatchRequest, private: LlRouting) -> Routing:
        shape = self.shape
        room = shape.num_ranks * shape.num_max_tokens
        nothing = self._empty.get(private.num_tokens)
        if nothing is None:
            nothing = torch.empty((private.num_tokens, 0), dtype=torch.int32, device=request.x.device)
            self._empty[private.num_tokens] = nothing
        return Routing(
            layout=Layout.PADDED,
            num_experts=shape.num_experts,
            num_max_tokens_per_rank=shape.num_max_tokens,
            expert_alignment=1,
            num_recv_tokens=room,
            num_rows=shape.num_local_experts * room,
            topk_idx=request.topk_idx,
            dst_rank=nothing,
            dst_row=nothing,
            psum_num_recv_tokens_per_rank=nothing,
            recv_src_token=nothing,
            private=private,
        )


@dataclass
class _SecondPhase:
    """Launches what one operation has left to do, on the current stream."""

    engine: LowLatencyEngine
    kernel: int
    num_blocks: int
    smem: int
    args: LlDispatchArgs | LlCombineArgs
    stream: int  # of the first phase
    kept: tuple[object, ...]  # what the kernel reads and writes must live until then

    def __call__(self) -> None:
        if self.engine.is_over:
            raise BufferDestroyed(
                "low_latency: the hook comes after its buffer was destroyed, or after a call of another shape divided "
                "the window anew; call hooks before that"
            )
        engine = self.engine
        if engine._launch(self.kernel, self.num_blocks, self.smem, self.args) != self.stream:
            # Memory of what is let go of now must not be given away before this stream has read it.
            for tensor in tensors_in(self.kept):
                tensor.record_stream(torch.cuda.current_stream(engine.device))


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
