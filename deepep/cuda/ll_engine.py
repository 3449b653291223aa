"""Low-latency dispatch and combine as kernel launches over a symmetric window; transports share it.

Everything a call needs travels in its argument struct, and all that changes from call to call (epochs, banks, counts)
lives on the device, so launches can be captured in CUDA graphs and mixed with eager calls.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
from deepep.cuda.launch import runtime
from deepep.cuda.ll_structs import Division, LlCleanArgs, LlCombineArgs, LlCommon, LlDispatchArgs, LlShape, Shape
from deepep.errors import InvalidArgument
from deepep.quant import FP8_DTYPE, GROUP_SIZE, SfFormat

_SF_CODES = {None: 0, SfFormat.FLOAT32: 1, SfFormat.POW2: 2, SfFormat.UE8M0: 3}
_STATE_ALIGNMENT = 16  # int32 elements
_MOST_PLANS = 256
_MIN_TEAM, _MAX_TEAM = 128, ll_structs.NUM_THREADS


class StateParts(NamedTuple):
    """Where the parts of a dispatch's block begin, in int32 words; epoch and headers come first."""

    home_topk: int
    routes: int
    route_weights: int
    layout_range: int
    src_info: int
    recv_count: int
    end: int

    @classmethod
    def divide(cls, shape: Shape, num_tokens: int) -> StateParts:
        """Divide the block of a dispatch of T tokens, each part at a multiple of 64 bytes."""
        room = shape.num_ranks * shape.num_max_tokens
        choices, num_local = room * shape.num_topk, shape.num_local_experts
        places = [_STATE_ALIGNMENT + ll_structs.MAX_RANKS]
        for size in (
            num_tokens * shape.num_topk, choices, choices, 2 * num_local * shape.num_ranks, num_local * room, num_local,
        ):  # fmt: skip
            places.append(places[-1] + _aligned(size))
        return cls(*places)


class DispatchPlan(NamedTuple):
    """What dispatches of as many tokens have in common: the grid, threads per team, and the block's division."""

    num_blocks: int
    team: int
    parts: StateParts


class Window(Protocol):
    """Symmetric memory as the engine sees it."""

    @property
    def peer_table(self) -> int:
        """Device address of every rank's base address."""

    @property
    def base(self) -> int:
        """Address of this rank's first byte."""


@dataclass(frozen=True)
class LlRouting:
    """What a dispatch leaves for its second phase and its combines; all of it on the device.

    Attributes:
        state: int32 words: epoch of the call, headers of the sources, `topk_idx` as sent, rows and weights of choices.
            One allocation serves these and the small outputs, which are views of it: the handle holds most of them,
            and they are small beside the rows, so nobody minds that they live together.
        parts: where in it each of them is.
        shape: the sizes it was made with.
        num_tokens: T.
        sent: identity of (topk_idx, topk_weights) whose weights travelled with dispatch, or None.
    """

    state: torch.Tensor
    parts: StateParts
    shape: Shape
    num_tokens: int
    sent: tuple[tuple[int, int], tuple[int, int]] | None

    def address(self, common: LlCommon) -> None:
        """Point the kernels' arguments to the parts of `state`."""
        parts = self.parts
        common.call_epoch = at = self.state.data_ptr()
        common.sources = at + 4 * _STATE_ALIGNMENT
        common.home_topk = at + 4 * parts.home_topk
        common.routes = at + 4 * parts.routes
        common.route_weights = at + 4 * parts.route_weights

    @classmethod
    def make(cls, request: DispatchRequest, shape: Shape, parts: StateParts) -> LlRouting:
        """Allocate for one dispatch."""
        state = torch.empty(parts.end, dtype=torch.int32, device=request.x.device)
        sent = None
        if request.topk_weights is not None and request.topk_idx is not None:
            sent = (_identity(request.topk_idx), _identity(request.topk_weights))
        return cls(state, parts, shape, request.x.shape[0], sent)


def _aligned(num_words: int) -> int:
    return -(-num_words // _STATE_ALIGNMENT) * _STATE_ALIGNMENT


def _identity(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor's values are and how often they were changed; not looked at on the device, which would wait."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


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

    def __init__(self, window: Window, division: Division, settings: Settings) -> None:
        shape, device = settings.shape, settings.device
        self.shape = shape
        self._division = division
        self._device = device
        self._dispatch_kernel = jit.load(ll_structs.DISPATCH, device)
        self._combine_kernel = jit.load(ll_structs.COMBINE, device)
        self._clean_kernel = jit.load(ll_structs.CLEAN, device)
        self._table_bytes = 4 * shape.num_experts
        if self._table_bytes > 48 << 10:
            self._dispatch_kernel.set_max_smem(self._table_bytes)
        self._keeps_own = self._prepare_own_sums()
        self._max_blocks = {
            kernel.handle: self._resident_blocks(kernel, smem, settings.ranks_per_gpu)
            for kernel, smem in (
                (self._dispatch_kernel, self._table_bytes),
                (self._combine_kernel, self._own_bytes(_MIN_TEAM) if self._keeps_own else 0),
            )
        }
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
            line_tokens=shape.num_line_tokens,
            dispatch_line_bytes=shape.dispatch_line_bytes,
            combine_line_bytes=shape.combine_line_bytes,
            line_row_offset=shape.line_row_offset,
        )
        # Launches copy their arguments, so one struct of each kind serves all calls but those of two phases.
        self._dispatch_args = LlDispatchArgs(common=self._common)
        self._combine_args = LlCombineArgs(common=self._common)
        self._runtime = runtime()
        self._empty: dict[int, torch.Tensor] = {}
        self._plans: dict[tuple[int, int, bool], DispatchPlan] = {}

    def clean(self, with_barrier: bool) -> None:
        """Bring the window's words and epochs back to their first state, on the current stream."""
        args = LlCleanArgs(
            common=self._common,
            words_offset=self._division.words_offset,
            num_words=self._division.num_words,
            is_barrier=int(with_barrier),
        )
        self._launch(self._clean_kernel.handle, 1, 0, args)

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Serve a padded dispatch request."""
        shape, x, sf_format = self.shape, request.x, request.sf_format
        num_ranks, num_local, hidden = shape.num_ranks, shape.num_local_experts, shape.hidden
        room = num_ranks * shape.num_max_tokens
        plan = self._dispatch_plan(x.shape[0], request.num_sms, sf_format)
        parts = plan.parts
        routing = LlRouting.make(request, shape, parts)
        state, recv_sf = routing.state, None
        dtype = x.dtype if sf_format is None else FP8_DTYPE
        recv_x = torch.empty((num_local, room, hidden), dtype=dtype, device=x.device)
        if sf_format is not None:
            recv_sf = _empty_sf(sf_format, num_local, room, hidden, x.device)
        args, at = self._dispatch_args, state.data_ptr()
        args.x, args.recv_x, args.recv_sf = x.data_ptr(), recv_x.data_ptr(), _pointer(recv_sf)
        args.topk_idx, args.topk_weights = _pointer(request.topk_idx), _pointer(request.topk_weights)
        args.recv_count, args.src_info = at + 4 * parts.recv_count, at + 4 * parts.src_info
        args.layout_range = at + 4 * parts.layout_range
        args.recv_stats = _pointer(request.cumulative_local_expert_recv_stats)
        args.sf_format = _SF_CODES[sf_format]
        common = args.common
        routing.address(common)
        common.wait_stats = _pointer(request.wait_recv_cost_stats)
        common.team_threads, common.num_tokens = plan.team, x.shape[0]
        kernel, kept = self._dispatch_kernel.handle, (request, recv_x, recv_sf, routing)
        launch = _Launch(self, kernel, plan.num_blocks, self._table_bytes, args, kept)
        finish = launch.start(request.split_phases)
        return DispatchResult(
            x=recv_x,
            sf=recv_sf,
            topk_idx=None,
            topk_weights=None,
            num_recv_tokens_per_expert=state.as_strided((num_local,), (1,), parts.recv_count),
            num_recv_tokens_per_expert_list=[],
            routing=self._routing(request, routing),
            src_info=state.as_strided((num_local, room), (room, 1), parts.src_info),
            layout_range=state.view(torch.int64).as_strided(
                (num_local, num_ranks), (num_ranks, 1), parts.layout_range // 2
            ),
            finish=finish,
        )

    def _dispatch_plan(self, num_tokens: int, num_sms: int, sf_format: SfFormat | None) -> DispatchPlan:
        key = (num_tokens, num_sms, sf_format is None)
        plan = self._plans.get(key)
        if plan is None:
            kernel, shape = self._dispatch_kernel.handle, self.shape
            if num_tokens <= shape.num_line_tokens:
                row_vecs = shape.hidden // (8 if sf_format is None else 16)
                grid = self._line_grid(kernel, num_tokens, num_sms, row_vecs, False)
            else:
                grid = self._grid(kernel, num_tokens, num_sms)
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._plans[key] = DispatchPlan(*grid, StateParts.divide(shape, num_tokens))
        return plan

    def combine(self, request: CombineRequest, x: torch.Tensor) -> CombineResult:
        """Serve a combine request of padded rows `x` [L, R*M, H]."""
        routing: LlRouting = request.routing.private
        is_per_copy = request.reduction is Reduction.PER_COPY
        self._check_combine(request, routing, is_per_copy)
        out = request.out
        if out is None:
            out = torch.empty((routing.num_tokens, self.shape.hidden), dtype=x.dtype, device=x.device)
        epoch = torch.empty(1, dtype=torch.int32, device=x.device) if request.split_phases else None
        args = self._combine_args
        args.x, args.out, args.combine_epoch = x.data_ptr(), out.data_ptr(), _pointer(epoch)
        args.topk_idx, args.topk_weights = _pointer(request.scale_topk_idx), _pointer(request.scale_topk_weights)
        args.is_per_copy, args.use_logfmt = int(is_per_copy), int(request.use_logfmt)
        args.has_sent_weights = int(routing.sent is not None)
        is_lined = routing.num_tokens <= self.shape.num_line_tokens and not is_per_copy
        # Between two launches the caller may change x, so then its own sums travel like the others. So they do as
        # lines: blocks that wait for other rows anyway would make them later than blocks of their own do.
        args.keeps_own = keeps_own = int(
            self._keeps_own and not is_per_copy and not is_lined and not request.split_phases
        )
        common = args.common
        routing.address(common)
        common.wait_stats = _pointer(request.wait_recv_cost_stats)
        common.num_tokens = routing.num_tokens
        kernel = self._combine_kernel.handle
        args.debt_parts = args.home_parts = 1
        if is_lined:
            row_vecs = self.shape.hidden // 8
            num_blocks, team = self._line_grid(kernel, routing.num_tokens, request.num_sms, row_vecs, True)
            # Ranks need not agree on these: a line does not tell who sent it.
            most, num_teams = -(-row_vecs // team), num_blocks * (_MAX_TEAM // team)
            num_rows = max(routing.num_tokens, 1)
            args.debt_parts = max(1, min(most, num_teams // (num_rows * self.shape.num_ranks)))
            args.home_parts = max(1, min(most, num_teams // num_rows))
        else:
            num_blocks, team = self._grid(kernel, routing.num_tokens, request.num_sms)
        common.team_threads = team
        smem = self._own_bytes(team) if keeps_own else 0
        launch = _Launch(self, kernel, num_blocks, smem, args, (request, x, out, epoch))
        return CombineResult(out, None, launch.start(request.split_phases))

    def _check_combine(self, request: CombineRequest, routing: LlRouting, is_per_copy: bool) -> None:
        op = "low_latency_combine"
        if request.use_logfmt and self.shape.hidden % GROUP_SIZE:
            raise InvalidArgument(
                f"{op}: use_logfmt needs hidden to be a multiple of {GROUP_SIZE}, got {self.shape.hidden}"
            )
        if routing.sent is None or is_per_copy:
            return
        for name, tensor, sent in zip(
            ("topk_idx", "topk_weights"),
            (request.scale_topk_idx, request.scale_topk_weights),
            routing.sent,
            strict=True,
        ):
            if tensor is None or _identity(tensor) != sent:
                raise InvalidArgument(
                    f"{op}: {name} is not the unchanged tensor that low_latency_dispatch got; since its topk_weights= "
                    "sent the weights ahead, pass the same tensors, or dispatch without topk_weights"
                )

    def _launch(self, kernel: int, num_blocks: int, smem: int, args: ctypes.Structure) -> None:
        driver.ensure_context(self._device)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._runtime.launch(kernel, num_blocks, ll_structs.NUM_THREADS, smem, stream, ctypes.addressof(args))

    def _own_bytes(self, team: int) -> int:
        """Shared memory for the sums of a rank's own tokens, one row per team."""
        return _MAX_TEAM // team * 2 * self.shape.hidden

    def _prepare_own_sums(self) -> bool:
        """Say whether they fit without keeping blocks from running side by side."""
        kernel, most = self._combine_kernel, self._own_bytes(_MIN_TEAM)
        limit = driver.device_attribute("CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", self._device)
        if most + kernel.shared_bytes > limit:
            return False
        kernel.set_max_smem(most)
        blocks = kernel.blocks_per_sm(ll_structs.NUM_THREADS, most)
        return blocks >= kernel.blocks_per_sm(ll_structs.NUM_THREADS, 0)

    def _resident_blocks(self, kernel: jit.Kernel, smem: int, ranks_per_gpu: int) -> int:
        """Blocks that certainly run at once: kernels that wait for peers need all of theirs, and all of the peers'."""
        num_sms = driver.device_attribute("CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT", self._device)
        return max(1, num_sms * kernel.blocks_per_sm(ll_structs.NUM_THREADS, smem) // ranks_per_gpu)

    def _grid(self, kernel: int, num_tokens: int, num_sms: int) -> tuple[int, int]:
        """Choose blocks and threads per team: as many threads on a row as leave every row a team of its own."""
        max_blocks = self._block_limit(kernel, num_sms)
        tokens = self._likely_tokens(num_tokens)
        num_rows = tokens * max(self.shape.num_ranks - 1, 1)
        team = _MAX_TEAM
        while team > _MIN_TEAM and max_blocks * (_MAX_TEAM // team) < num_rows:
            team //= 2
        rows_per_block = _MAX_TEAM // team
        return min(max_blocks, max(tokens + 1, -(-num_rows // rows_per_block))), team

    def _line_grid(
        self, kernel: int, num_tokens: int, num_sms: int, row_vecs: int, is_combine: bool
    ) -> tuple[int, int]:
        """Choose the same where rows are lines: one vector per thread, and a rank's own rows are like the others'.

        In combine several teams may share a row, and those that add up need not have sent before.
        """
        max_blocks = self._block_limit(kernel, num_sms)
        tokens = self._likely_tokens(num_tokens)
        num_rows = tokens * self.shape.num_ranks
        team = _MAX_TEAM
        while team > _MIN_TEAM and (team >= 2 * row_vecs or max_blocks * (_MAX_TEAM // team) < num_rows):
            team //= 2
        num_items = (num_rows + tokens) * -(-row_vecs // team) if is_combine else num_rows
        rows_per_block = _MAX_TEAM // team
        return min(max_blocks, max(tokens + 1, -(-num_items // rows_per_block))), team

    def _block_limit(self, kernel: int, num_sms: int) -> int:
        max_blocks = self._max_blocks[kernel]
        return max(1, min(max_blocks, 2 * num_sms)) if num_sms else max_blocks

    def _likely_tokens(self, num_tokens: int) -> int:
        """Tokens to choose a grid for: the other ranks may have more than this one."""
        return max(num_tokens, self.shape.num_max_tokens // 16, 1)

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
class _Launch:
    """One operation: a launch for both phases, or one for each; calling it is the second one, on the current stream."""

    engine: LowLatencyEngine
    kernel: int
    num_blocks: int
    smem: int
    args: LlDispatchArgs | LlCombineArgs
    kept: tuple[object, ...]  # what the kernel reads and writes must live until then

    def start(self, in_two_phases: bool) -> _Launch | None:
        """Launch both phases, or the first one and give back what launches the second."""
        self.args.common.phases = ll_structs.SEND if in_two_phases else ll_structs.SEND | ll_structs.RECV
        self.engine._launch(self.kernel, self.num_blocks, self.smem, self.args)
        if not in_two_phases:
            return None
        self.args = type(self.args).from_buffer_copy(self.args)
        self.args.common.phases = ll_structs.RECV
        return self

    def __call__(self) -> None:
        self.engine._launch(self.kernel, self.num_blocks, self.smem, self.args)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _empty_sf(sf_format: SfFormat, num_local: int, room: int, hidden: int, device: torch.device) -> torch.Tensor:
    """Scale factors [L, R*M, n], the last two dimensions column-major."""
    num_sf = hidden // sf_format.hidden_multiple
    shape, strides = (num_local, room, num_sf), (num_sf * room, 1, room)
    return torch.empty_strided(shape, strides, dtype=sf_format.dtype, device=device)
