"""Low latency over CUDA IPC: the window, the masks and the errors around `deepep.cuda.ll_engine`."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import fields, replace
from typing import Any

import torch

from deepep.backends.base import (
    BackendOptions,
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    Reduction,
    Routing,
)
from deepep.backends.ipc.memory import SymmetricMemory
from deepep.cuda import driver, ll_structs
from deepep.cuda.call_order import CallOrder
from deepep.cuda.host_words import HostWords
from deepep.cuda.launch import current_stream
from deepep.cuda.ll_engine import LowLatencyEngine, Settings
from deepep.cuda.ll_state import LlRouting
from deepep.cuda.ll_structs import Division, LlState, Shape, divide
from deepep.errors import BufferDestroyed, CommTimeout, InvalidArgument, UnsupportedOperation
from deepep.group import Group
from deepep.validate import raise_unless_equal

_OPS = ("low_latency_dispatch", "low_latency_combine", "clean_low_latency_buffer")
_MOST_SHAPES = 256

_make_shape = functools.lru_cache(_MOST_SHAPES)(Shape)
"""The same object for the same sizes, so that calls need not compare sizes with those of the call before."""


class LowLatency:
    """Low-latency operations of one buffer. Construction is collective.

    The window is divided at the first call, for the shape of that call. Calls of another shape divide it anew, which
    makes all ranks meet and must not happen inside a graph capture; graphs captured before must not be replayed then.
    """

    def __init__(
        self, group: Group, options: BackendOptions, device: int, ranks_per_gpu: int, order: CallOrder
    ) -> None:
        if group.num_ranks > ll_structs.MAX_RANKS:
            raise UnsupportedOperation(
                f"low_latency: backend 'ipc' serves at most {ll_structs.MAX_RANKS} ranks, the group has "
                f"{group.num_ranks}; use backend='reference'"
            )
        self._group, self._options, self._device = group, options, device
        self._ranks_per_gpu, self._order = ranks_per_gpu, order
        num_bytes = options.num_rdma_bytes + ll_structs.SPARE_BYTES
        self._memory = SymmetricMemory(group, num_bytes, device, options.timeout)
        self._status = HostWords(8 * (2 + group.num_ranks))
        self._engine: LowLatencyEngine | None = None
        self._next_combine_x: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Size of this rank's window."""
        return self._memory.num_bytes

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Serve a dispatch into padded rows.

        Raises:
            UnsupportedOperation: scale factors of the user's own, a cached routing, no top-k.
            CommTimeout: an earlier call lost a rank.
        """
        self._check_status()
        x, topk_idx = request.x, request.topk_idx
        if request.sf is not None or request.routing is not None or topk_idx is None:
            raise UnsupportedOperation(
                "low_latency_dispatch: backend 'ipc' sends bf16 rows along a fresh top-k into padded rows; for scale "
                "factors of your own or a cached routing use backend='reference'"
            )
        num_tokens, hidden = x.shape
        num_topk, num_max_tokens = topk_idx.shape[1], request.num_max_tokens_per_rank
        shape = _make_shape(self._group.num_ranks, request.num_experts, num_topk, num_max_tokens, hidden)
        return self._engine_for(shape).dispatch(request, num_tokens)

    def combine(self, request: CombineRequest) -> CombineResult:
        """Serve a combine of padded rows; raises `CommTimeout` if an earlier call lost a rank."""
        self._check_status()
        routing = request.routing.private
        if not isinstance(routing, LlRouting) or request.scale_topk_idx is None or request.bias:
            raise UnsupportedOperation(
                "low_latency_combine: backend 'ipc' needs topk_idx, topk_weights and a handle of its own dispatch, and "
                "takes no bias; use backend='reference'"
            )
        x = request.x
        if request.zero_copy:
            if self._next_combine_x is None:
                raise InvalidArgument("low_latency_combine: zero_copy=True, but no combine buffer was asked for")
            x = self._next_combine_x
            if x.shape != request.x.shape:
                raise InvalidArgument(
                    f"low_latency_combine: the combine buffer is {list(x.shape)} and the handle's rows are "
                    f"{list(request.x.shape)}; ask for the buffer with this handle"
                )
            # Another one may be asked for, and this one be let go of, while kernels read it.
            x.record_stream(torch.cuda.current_stream(self._device))
        shape = routing.shape
        if request.reduction is Reduction.PER_COPY and shape.num_topk > shape.num_ranks:
            shape = replace(shape, per_copy=True)
        return self._engine_for(shape).combine(request, x)

    def next_combine_buffer(self, routing: Routing, hidden: int) -> torch.Tensor:
        """Give rows [L, R*M, H] that combine reads in place; owners push from wherever rows lie, so any memory does."""
        num_local = routing.num_experts // self._group.num_ranks
        room = self._group.num_ranks * routing.num_max_tokens_per_rank
        self._next_combine_x = torch.empty((num_local, room, hidden), dtype=torch.bfloat16, device=self._device)
        return self._next_combine_x

    def update_mask(self, rank: int, masked: bool) -> None:
        """Leave a rank out, or take it back in, from the current stream's next call on; see `clean_mask`."""
        self._mask()[rank] = int(masked)

    def query_mask(self, mask_status: torch.Tensor) -> None:
        """Write the mask into an int32 [R] tensor."""
        mask_status.copy_(self._mask())

    def clean_mask(self) -> None:
        """Take every rank back in; follow it with `clean` on all ranks, so that nothing of earlier calls is left."""
        self._mask().zero_()

    def clean(self, num_max_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Bring the window back to its first state; collective among the ranks that are not masked."""
        engine = self._engine
        if engine is None:
            return
        shape = engine.shape
        wanted: dict[str, Any] = {
            "num_max_tokens": num_max_tokens_per_rank,
            "hidden": hidden,
            "num_experts": num_experts,
        }
        if replace(shape, **wanted) == shape:
            self._clean(engine)
        else:
            self._divide(replace(shape, **wanted, per_copy=False))

    def local_buffer(self) -> torch.Tensor:
        """Give the window as bytes."""
        return self._memory.as_tensor(0, (self._memory.num_bytes,), torch.uint8)

    def close(self) -> None:
        """Give everything back; may be called twice, never raises and never waits for other ranks."""
        if self._engine is not None:
            self._engine.is_over = True
        self._engine = None
        self._memory.close()
        self._status.close()

    def _mask(self) -> torch.Tensor:
        return self._per_rank(LlState.mask.offset)

    def _per_rank(self, offset: int) -> torch.Tensor:
        return self._memory.as_tensor(offset, (self._group.num_ranks,), torch.int32)

    def _check_status(self) -> None:
        status = self._status.host
        if not self._memory.is_alive:
            raise BufferDestroyed("low_latency: this buffer was destroyed; build a new one")
        if not status[0]:
            return
        if status[0] == ll_structs.BAD_INDEX:
            index = ctypes.c_int32(int(status[1 + self._group.num_ranks])).value
            # The same kernels may have lost a rank, too; the next call says so.
            status[0] = 1 if status[1 : 1 + self._group.num_ranks].any() else 0
            raise InvalidArgument(f"low_latency_dispatch: expert {index} is out of range (found on the device)")
        if status[0] == ll_structs.NOT_CLEANED:
            status[: 1 + self._group.num_ranks] = 0
            self._check_cleaned()
        if status[0] != 0:
            missing = [rank for rank in range(self._group.num_ranks) if status[1 + rank] != 0]
            raise CommTimeout(_OPS[int(status[0]) - 1], missing, self._options.timeout)

    def _check_cleaned(self) -> None:
        """Raise if a rank that was taken back in is left out; kernels said so, but the window may be clean by now."""
        if torch.cuda.is_current_stream_capturing():
            return  # they will say it again
        masked, stale = self._mask().tolist(), self._per_rank(LlState.is_stale.offset).tolist()
        lost = [rank for rank, is_masked in enumerate(masked) if is_masked]
        if lost and not self._options.enable_shrink:
            raise CommTimeout(_OPS[0], lost, self._options.timeout)
        back = [rank for rank, is_stale in enumerate(stale) if is_stale and rank not in lost]
        if back:
            raise InvalidArgument(
                f"low_latency: rank(s) {back} were masked and taken back in, but the window was not cleaned since, so "
                "they were left out; let all ranks call clean_low_latency_buffer first"
            )

    def _engine_for(self, shape: Shape) -> LowLatencyEngine:
        engine = self._engine
        # Sizes are slow to compare. Room for a row per choice serves a row per rank, too.
        if engine is not None and (
            engine.shape is shape or engine.shape == shape or engine.shape == replace(shape, per_copy=True)
        ):
            return engine
        return self._divide(shape)

    def _divide(self, shape: Shape) -> LowLatencyEngine:
        """Divide the window for another shape, and enlarge it if need be. All ranks do so at the same call."""
        if torch.cuda.is_current_stream_capturing():
            raise InvalidArgument(
                "low_latency: the first call of a shape prepares the window and cannot be captured; make one such call "
                "before the capture"
            )
        self._agree(shape)
        division = divide(shape)
        is_first = self._engine is None
        if division.num_bytes > self._memory.num_bytes:
            torch.cuda.current_stream().synchronize()
            mask = self._mask().clone()
            grown = SymmetricMemory(self._group, division.num_bytes, self._device, self._options.timeout)
            self._memory.close()
            self._memory, is_first = grown, True
            self._mask().copy_(mask)
        if self._engine is not None:
            self._engine.is_over = True
        self._engine = engine = self._make_engine(shape, division)
        if not is_first:
            self._clean(engine)
        return engine

    def _agree(self, shape: Shape) -> None:
        """Compare sizes with the other ranks, since kernels store at offsets that follow from them.

        Not where ranks may be lost: nobody could say which ones to wait for. (There the sizes must be equal.)
        """
        if self._options.enable_shrink:
            return
        everyone = self._group.all_gather_object(shape, op="low_latency", timeout=self._options.timeout)
        for field in fields(shape):
            raise_unless_equal("low_latency", field.name, [getattr(theirs, field.name) for theirs in everyone])

    def _make_engine(self, shape: Shape, division: Division) -> LowLatencyEngine:
        options = self._options
        settings = Settings(
            shape=shape,
            rank=self._group.rank,
            device=self._device,
            ranks_per_gpu=self._ranks_per_gpu,
            status_address=self._status.device_address,
            timeout=options.timeout,
            is_shrinkable=options.enable_shrink,
        )
        return LowLatencyEngine(self._memory, division, settings, self._order)

    def _clean(self, engine: LowLatencyEngine) -> None:
        """Ranks meet, clear the window, and meet again; on the device where some may be masked."""
        driver.ensure_context(self._device)
        self._order.enter(current_stream(self._device))
        if self._options.enable_shrink:
            engine.meet()
            self._zero(engine)
            engine.reset(then_meet=True)
            return
        stream, timeout = torch.cuda.current_stream(), self._options.timeout
        stream.synchronize()
        self._group.barrier(op=_OPS[2], timeout=timeout)
        self._zero(engine)
        engine.reset(then_meet=False)
        stream.synchronize()
        self._group.barrier(op=_OPS[2], timeout=timeout)

    def _zero(self, engine: LowLatencyEngine) -> None:
        division = engine.division
        num_bytes = division.num_bytes - division.banks_offset
        self._memory.as_tensor(division.banks_offset, (num_bytes,), torch.uint8).zero_()
