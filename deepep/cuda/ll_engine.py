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
from deepep.cuda.launch import aligned, current_stream, pointer, runtime
from deepep.cuda.ll_grid import Grids
from deepep.cuda.ll_plan import CombinePlan, DispatchPlan, Launch
from deepep.cuda.ll_state import LlRouting, NextBlock, Sent, identity
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
        dispatch_kernel, combine_kernel, self._clean_kernel = (jit.load(spec, device) for spec in shape.kernels)
        grids = Grids(shape, device, settings.ranks_per_gpu, dispatch_kernel, combine_kernel)
        self._common = common = LlCommon(
            peer_table=window.peer_table,
            own_base=window.base,
            window=division.window,
            status=settings.status_address,
            timeout_ns=int(settings.timeout * 1e9),
            is_shrinkable=int(settings.is_shrinkable),
        )
        common.shape = LlShape(
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
        self._next_block = NextBlock()
        remembered = functools.lru_cache(_MOST_PLANS)
        make_dispatch = functools.partial(DispatchPlan.make, shape, grids, common, dispatch_kernel.handle)
        self._plan_dispatch = remembered(make_dispatch)
        self._plan_combine = remembered(functools.partial(CombinePlan.make, grids, common, combine_kernel.handle))

    def meet(self) -> None:
        """Let the current stream go on when all ranks that are not masked have come here."""
        self._launch_clean(is_barrier=True)

    def reset(self, then_meet: bool) -> None:
        """Bring the state back to its beginning, all behind it being zeros by now; on the current stream."""
        self._launch_clean(is_barrier=then_meet, resets=True)

    def _launch_clean(self, is_barrier: bool, resets: bool = False) -> None:
        args = LlCleanArgs(common=self._common, is_barrier=int(is_barrier), resets=int(resets))
        self._launch(Launch(self._clean_kernel.handle, 1, 0, ctypes.addressof(args)), current_stream(self.device))

    def dispatch(self, request: DispatchRequest, num_tokens: int) -> DispatchResult:
        """Serve a padded dispatch request of T tokens."""
        x = aligned(request.x)
        plan = self._plan_dispatch(num_tokens, request.num_sms, request.sf_format, request.split_phases, x.device)
        stream = current_stream(self.device)
        state, recv_x = self._next_block.take(plan.state, stream), torch.empty_like(plan.recv_x)
        at = state.data_ptr()
        sources, home_topk, routes, route_weights, layout_range, src_info, recv_count, recv_sf, _ = plan.parts
        addresses = (at, at + sources, at + home_topk, at + routes, at + route_weights)
        ll_structs.write_dispatch_call(
            plan.args, ll_structs.CALL_OFFSET, pointer(request.wait_recv_cost_stats), *addresses,
            x.data_ptr(), pointer(request.topk_idx), pointer(request.topk_weights), recv_x.data_ptr(),
            at + recv_sf, at + recv_count, at + src_info, at + layout_range,
            pointer(request.cumulative_local_expert_recv_stats),
        )  # fmt: skip
        self._launch(plan.launch, stream)
        # All else is made while the kernel runs.
        self._next_block.allocate(plan.state, stream)
        finish, shape = None, self.shape
        if request.split_phases:
            finish = _SecondPhase.of(self, plan, stream, (request, x, recv_x, state))
        num_local, room = shape.num_local_experts, shape.num_ranks * shape.num_max_tokens
        return DispatchResult(
            x=recv_x,
            sf=None if plan.sf is None else plan.sf.of(state),
            topk_idx=None,
            topk_weights=None,
            num_recv_tokens_per_expert=state.as_strided((num_local,), (1,), recv_count // 4),
            num_recv_tokens_per_expert_list=[],
            routing=self._routing(request, LlRouting.of(request, state, addresses, shape, num_tokens)),
            src_info=state.as_strided((num_local, room), (room, 1), src_info // 4),
            layout_range=state.view(torch.int64).as_strided(
                (num_local, shape.num_ranks), (shape.num_ranks, 1), layout_range // 8
            ),
            finish=finish,
        )

    def combine(self, request: CombineRequest, x: torch.Tensor) -> CombineResult:
        """Serve a combine request of padded rows `x` [L, R*M, H]."""
        routing: LlRouting = request.routing.private
        split_phases, device = request.split_phases, x.device
        sent, is_per_copy = routing.sent, request.reduction is Reduction.PER_COPY
        if sent is not None and not is_per_copy:
            self._check_sent(request, sent)
        plan = self._plan_combine(
            routing.num_tokens, request.num_sms, is_per_copy, request.use_logfmt, sent is not None, split_phases, device
        )
        out, x = request.out, aligned(x)
        if out is None:
            out = torch.empty_like(plan.out)
        epoch = torch.empty(1, dtype=torch.int32, device=device) if split_phases else None
        ll_structs.write_combine_call(
            plan.args, ll_structs.CALL_OFFSET, pointer(request.wait_recv_cost_stats), *routing.addresses,
            x.data_ptr(), pointer(request.scale_topk_idx), pointer(request.scale_topk_weights), out.data_ptr(),
            pointer(epoch),
        )  # fmt: skip
        stream = current_stream(self.device)
        self._launch(plan.launch, stream)
        finish = None
        if split_phases:
            finish = _SecondPhase.of(self, plan, stream, (request, x, out, epoch))
        return CombineResult(out, None, finish)

    @staticmethod
    def _check_sent(request: CombineRequest, sent: Sent) -> None:
        op = "low_latency_combine"
        given = (request.scale_topk_idx, request.scale_topk_weights)
        for name, tensor, before in zip(("topk_idx", "topk_weights"), given, sent, strict=True):
            if tensor is None or identity(tensor) != before:
                raise InvalidArgument(
                    f"{op}: {name} is not the unchanged tensor that low_latency_dispatch got; since its topk_weights= "
                    "sent the weights ahead, pass the same tensors, or dispatch without topk_weights"
                )

    def _launch(self, launch: Launch, stream: int) -> None:
        driver.ensure_context(self.device)
        self._order.enter(stream)
        kernel, num_blocks, smem, args = launch
        self._runtime.launch(kernel, num_blocks, ll_structs.NUM_THREADS, smem, stream, args, False, self._starts_early)
        self._order.leave(stream)

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
    launch: Launch
    args: LlDispatchArgs | LlCombineArgs  # of that launch
    stream: int  # of the first phase
    kept: tuple[object, ...]  # what the kernel reads and writes must live until then

    @classmethod
    def of(
        cls, engine: LowLatencyEngine, plan: DispatchPlan | CombinePlan, stream: int, kept: tuple[object, ...]
    ) -> _SecondPhase:
        """Take down the arguments of the first phase, just launched, since the plan's serve other calls meanwhile."""
        args = type(plan.args).from_buffer_copy(plan.args)
        args.common.phases = ll_structs.RECV
        return cls(engine, plan.launch._replace(args=ctypes.addressof(args)), args, stream, kept)

    def __call__(self) -> None:
        if self.engine.is_over:
            raise BufferDestroyed(
                "low_latency: the hook comes after its buffer was destroyed, or after a call of another shape divided "
                "the window anew; call hooks before that"
            )
        engine, stream = self.engine, current_stream(self.engine.device)
        engine._launch(self.launch, stream)
        if stream != self.stream:
            # Memory of what is let go of now must not be given away before this stream has read it.
            for tensor in tensors_in(self.kept):
                tensor.record_stream(torch.cuda.current_stream(engine.device))
