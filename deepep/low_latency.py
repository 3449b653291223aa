"""The low-latency methods of `Buffer`: padded rows, fused casts, receive hooks, masks (CONTRACT, 'Low latency')."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from deepep.backends.base import CombineRequest, DispatchRequest, Layout, Reduction
from deepep.errors import InvalidArgument
from deepep.event import EventOverlap
from deepep.front import REFUSABLE, refuse
from deepep.handle import LowLatencyHandle, make_low_latency_handle, routing_of
from deepep.layout import align
from deepep.quant import GROUP_SIZE, SfFormat
from deepep.validate import (
    ROW_BYTES_MULTIPLE,
    Payload,
    check_experts,
    check_rows,
    check_tensor,
    check_topk,
    check_written,
    received,
    whole_number,
)

if TYPE_CHECKING:
    from deepep.front import Front

    _Base = Front
else:
    _Base = object

_REDUCTIONS = {item.value: item for item in Reduction}

# Of which a low-latency window is made.
_MAX_TOPK, _CHOICE_BYTES, _WORD_BYTES = 64, 16, 8
_STATE_BYTES, _NUM_ARRAYS, _ALIGNMENT = 4096, 8, 128
_MOST_FORMATS = 64

Hook = Callable[[], None]


class LowLatencyMixin(_Base):
    """Decode-size dispatch and combine without CPU synchronisation."""

    enable_shrink: bool

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes low latency needs: two banks of R*M rows each way, and some words.

        Covers any number of choices a token may have (64). Combining per copy, with more choices than ranks, needs
        more; `ipc` then makes its window larger at the first such call.

        Args:
            num_max_dispatch_tokens_per_rank: M.
            hidden: H.
            num_ranks: R.
            num_experts: E; upstream's buffers grow with it by rows, these by a word each.
        """
        num_experts = check_experts("get_low_latency_rdma_size_hint", num_experts, num_ranks)
        num_rows, row_bytes = num_ranks * num_max_dispatch_tokens_per_rank, 2 * hidden
        # Tests compare this with the division of the window, which belongs to backends that are not imported here.
        slot_bytes = align(row_bytes + _CHOICE_BYTES * _MAX_TOPK, _ALIGNMENT)
        bank = num_rows * (slot_bytes + row_bytes + _WORD_BYTES * (_MAX_TOPK + 1))
        bank += _WORD_BYTES * (num_experts + 3 * num_ranks) + _NUM_ARRAYS * _ALIGNMENT
        return _STATE_BYTES + 2 * align(bank, _ALIGNMENT)

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        topk_weights: torch.Tensor | None = None,
    ) -> tuple[Payload, torch.Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Send tokens into padded rows per local expert; never waits on the CPU for counts.

        Args:
            x: [T, H] bf16, T <= M.
            topk_idx: [T, K] int64, -1 = no expert.
            num_max_dispatch_tokens_per_rank: M, equal on all ranks.
            num_experts: E.
            cumulative_local_expert_recv_stats: [L] int32, the counts are added to it.
            dispatch_wait_recv_cost_stats: [R] int64, microseconds waited for each rank are added to it.
            use_fp8: cast to e4m3 on the way, one scale factor per 128 channels; else the next two say nothing.
            round_scale: round scale factors up to powers of two.
            use_ue8m0: pack their exponents, four to an int32; needs `round_scale`.
            async_finish: run on the communication stream.
            return_recv_hook: return at once; data is complete after `hook()`. Excludes `async_finish`.
            topk_weights: [T, K] float32 that combine will use; lets backends send them ahead (ours).

        Returns:
            `recv_x` [L, R*M, H] or `(recv_x, sf)` with sf [L, R*M, H/128] f32 or [L, R*M, H/512] i32, last two
            dimensions column-major; `recv_count` [L] i32; handle; event; hook or None.
        """
        op = "low_latency_dispatch"
        backend = self._alive(op)
        try:  # as `_checking` does, which takes 0.3 us
            num_tokens, hidden = check_rows(op, "x", x)
            max_tokens = whole_number(op, "num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1)
            device = x.device
            if x.dtype is not torch.bfloat16:
                raise InvalidArgument(f"{op}: x is {x.dtype}; it must be bfloat16")
            if num_tokens > max_tokens:
                raise InvalidArgument(
                    f"{op}: x has T = {num_tokens} tokens; num_max_dispatch_tokens_per_rank allows {max_tokens}"
                )
            num_experts = check_experts(op, num_experts, self.group_size)
            check_topk(op, topk_idx, topk_weights, num_tokens, num_experts, self._bounds, device)
            recv_stats, wait_stats = cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats
            if recv_stats is not None:
                name, shape = "cumulative_local_expert_recv_stats", (num_experts // self.group_size,)
                check_written(op, name, recv_stats, torch.int32, shape, device)
            if wait_stats is not None:
                self._check_wait_stats(op, "dispatch_wait_recv_cost_stats", wait_stats, device)
            _check_phases(op, async_finish, return_recv_hook)
            sf_format = _sf_format(op, hidden, use_fp8, round_scale, use_ue8m0)
            request = DispatchRequest(
                x, None, topk_idx, topk_weights, num_experts, max_tokens, Layout.PADDED, sf_format, return_recv_hook,
                recv_stats, wait_stats,
            )  # fmt: skip
        except REFUSABLE as error:
            refuse(backend, op, error)
        result, event = self._dispatch(op, backend, request, async_finish, None)
        handle = make_low_latency_handle(result, hidden, self._owner)
        return received(result, x), result.num_recv_tokens_per_expert, handle, event, result.finish

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
        *,
        reduction: str = "per_rank",
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Bring expert outputs home, weighted by the caller's `topk_weights`.

        Args:
            x: [L, R*M, H] bf16, rows as dispatch laid them out.
            topk_idx: [T, K] int64 of the dispatched tokens.
            topk_weights: [T, K] float32.
            handle: of the dispatch.
            use_logfmt: send rows through the LogFMT-10 cast.
            zero_copy: the rows are in `get_next_low_latency_combine_buffer(handle)`; `x` is not read.
            async_finish: run on the communication stream.
            return_recv_hook: return at once; the result is complete after `hook()`. Excludes `async_finish`.
            out: [T, H] bf16 to write to.
            combine_wait_recv_cost_stats: [R] int64, microseconds waited for each rank are added to it.
            reduction: "per_rank" adds one token's rows at their owner and rounds once; "per_copy" sends every row.

        Returns:
            `combined_x` [T, H] bf16, event, hook or None.
        """
        op = "low_latency_combine"
        backend = self._alive(op)
        try:  # as `_checking` does, which takes 0.3 us
            routing = routing_of(handle, (LowLatencyHandle,), self._owner, op)
            num_tokens = routing.dst_rank.shape[0]
            rows = (
                routing.num_experts // self.group_size, self.group_size * routing.num_max_tokens_per_rank,
                handle.hidden,
            )  # fmt: skip
            device = routing.dst_rank.device
            check_tensor(op, "x", x, torch.bfloat16, rows, device)
            if use_logfmt:
                _check_logfmt(op, handle.hidden, zero_copy)
            if not zero_copy and not x.is_contiguous():
                raise InvalidArgument(f"{op}: x must be contiguous")
            num_topk = check_topk(op, topk_idx, topk_weights, num_tokens, routing.num_experts, self._bounds, device)
            if topk_weights is None:
                raise InvalidArgument(f"{op}: topk_weights is needed")
            sent_topk = num_topk if routing.topk_idx is None else routing.topk_idx.shape[1]
            if sent_topk != num_topk:
                raise InvalidArgument(
                    f"{op}: topk_idx has K = {num_topk} columns and the handle's dispatch had {sent_topk}"
                )
            if out is not None:
                _check_out(op, out, (num_tokens, handle.hidden), device)
            added = _REDUCTIONS.get(reduction)
            if added is None:
                raise InvalidArgument(f"{op}: reduction is {reduction!r}; it must be 'per_rank' or 'per_copy'")
            wait_stats = combine_wait_recv_cost_stats
            if wait_stats is not None:
                self._check_wait_stats(op, "combine_wait_recv_cost_stats", wait_stats, device)
            _check_phases(op, async_finish, return_recv_hook)
            request = CombineRequest(
                x, routing, topk_idx, topk_weights, added, use_logfmt, zero_copy, out, return_recv_hook, wait_stats
            )
        except REFUSABLE as error:
            refuse(backend, op, error)
        result, event = self._combine(op, backend, request, async_finish, None)
        return result.x, event, result.finish

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """Give the bf16 [L, R*M, H] tensor to fill for the next `low_latency_combine(..., zero_copy=True)`."""
        op = "get_next_low_latency_combine_buffer"
        backend = self._alive(op)
        return backend.next_combine_buffer(routing_of(handle, (LowLatencyHandle,), self._owner, op), handle.hidden)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Make the windows ready for low latency after normal operations; collective (upstream API)."""
        op = "clean_low_latency_buffer"
        with self._checking(op) as backend:
            shape = (
                whole_number(op, "num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 0),
                whole_number(op, "hidden", hidden, 1),
                check_experts(op, num_experts, self.group_size),
            )
        self._run(lambda: backend.clean_low_latency_buffer(*shape), (), False, False, None)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of low-latency operations (`mask=True`), or take it back in.

        A buffer that a `CommTimeout` broke goes on in low latency once every rank that it named is masked, where the
        backend can (`ipc`). When a rank is taken back in, all ranks call `clean_low_latency_buffer` before they go on;
        `ipc` leaves it out until then, and says so by `InvalidArgument` from the call after.
        """
        op = "low_latency_update_mask_buffer"
        if not 0 <= rank_to_mask < self.group_size or rank_to_mask == self.rank:
            raise InvalidArgument(f"{op}: rank_to_mask is {rank_to_mask}; it must be another rank of the group")
        self._shrinkable(op)
        self._update_mask(op, rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for masked ranks and 0 for the others into `mask_status`, [R] int32."""
        op = "low_latency_query_mask_buffer"
        self._shrinkable(op)
        check_tensor(op, "mask_status", mask_status, torch.int32, (self.group_size,))
        self._alive(op).query_mask(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Take every masked rank back in; see `low_latency_update_mask_buffer`."""
        op = "low_latency_clean_mask_buffer"
        self._shrinkable(op)
        self._alive(op).clean_mask()

    def _shrinkable(self, op: str) -> None:
        if not self.enable_shrink:
            raise InvalidArgument(f"{op}: masks need Buffer(..., enable_shrink=True)")

    def _check_wait_stats(self, op: str, name: str, stats: torch.Tensor, device: torch.device) -> None:
        check_written(op, name, stats, torch.int64, (self.group_size,), device)


def _check_phases(op: str, async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise InvalidArgument(f"{op}: async_finish and return_recv_hook exclude each other")


def _check_logfmt(op: str, hidden: int, zero_copy: bool) -> None:
    if hidden % GROUP_SIZE:
        raise InvalidArgument(f"{op}: use_logfmt needs hidden to be a multiple of {GROUP_SIZE}, got {hidden}")
    if zero_copy:
        raise InvalidArgument(f"{op}: zero_copy and use_logfmt exclude each other")


def _check_out(op: str, out: torch.Tensor, shape: tuple[int, int], device: torch.device) -> None:
    check_written(op, "out", out, torch.bfloat16, shape, device)
    if out.data_ptr() % ROW_BYTES_MULTIPLE:
        raise InvalidArgument(f"{op}: out must begin at a multiple of {ROW_BYTES_MULTIPLE} bytes")


@functools.lru_cache(_MOST_FORMATS)
def _sf_format(op: str, hidden: int, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> SfFormat | None:
    if not use_fp8:
        return None  # the other two say how to cast, which programs tell also where nothing is cast
    if use_ue8m0 and not round_scale:
        raise InvalidArgument(f"{op}: use_ue8m0 needs round_scale=True, since exponents alone hold only powers of two")
    sf_format = SfFormat.from_flags(round_scale, use_ue8m0)
    if hidden % sf_format.hidden_multiple:
        raise InvalidArgument(
            f"{op}: hidden is {hidden}; scale factors per {GROUP_SIZE} channels need a multiple of "
            f"{sf_format.hidden_multiple}"
        )
    return sf_format
