"""`Buffer`: the first-generation surface. Each method checks its arguments, states a request and unpacks the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from deepep.buffer_requests import Given, cached_request, combine_request, fresh_request
from deepep.config import Config, default_config
from deepep.errors import InvalidArgument
from deepep.event import Event, EventHandle, EventOverlap
from deepep.front import REFUSABLE, Front, refuse
from deepep.handle import InternodeHandle, IntranodeHandle, NormalHandle, make_normal_handle, routing_of
from deepep.low_latency import LowLatencyMixin
from deepep.stream import check_stream_arguments
from deepep.topology import Topology
from deepep.validate import Payload, check_experts, check_topk, received, split_payload

# What `dispatch` returns. The types within follow from the arguments, which the caller knows and a checker does not:
# a tensor or a pair as `x` was; None without top-k or with a handle.
Dispatched = tuple[Any, Any, Any, Any, Any, EventOverlap]


class Buffer(LowLatencyMixin, Front):
    """Dispatch tokens to the ranks of their experts and combine what comes back (CONTRACT, '`Buffer`').

    Construction is collective. Arguments up to `comm` are upstream's; those after it are this library's.

    Args:
        group: torch ProcessGroup of any kind (often a CPU group although tensors are on GPUs).
        num_nvl_bytes: least size of the windows within a host, bytes; backends take what they need beyond it.
        num_rdma_bytes: the same across hosts and for low latency, bytes.
        low_latency_mode: prepare the low-latency operations; only the reference backend has them without.
        num_qps_per_rank: kept for programs that pass it; network queues are the backend's business.
        allow_nvlink_for_low_latency_mode: likewise.
        allow_mnnvl: likewise.
        explicitly_destroy: likewise; `destroy()` may be called either way.
        enable_shrink: allow masks in low-latency mode; there `ipc` masks a rank that does not arrive, instead of
            raising, while the reference backend's group does not survive one.
        comm: mpi4py communicator, instead of `group`.
        backend: "auto" or a name of `python -m deepep doctor`; `DEEPEP_BACKEND` where not given.
        timeout: longest wait for a peer, seconds; `DEEPEP_TIMEOUT` or 100 where not given.
        topology: who shares a host; found out where not given.

    Raises:
        InvalidArgument: arguments are wrong, or ranks disagree about them.
        BackendUnavailable: the backend cannot run here; one line per backend says why and what mends it.
        CommTimeout: a rank did not come to construct its buffer.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        backend: str | None = None,
        timeout: float | None = None,
        topology: Topology | None = None,
    ) -> None:
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.num_qps_per_rank = num_qps_per_rank
        self.allow_nvlink_for_low_latency_mode = allow_nvlink_for_low_latency_mode
        self.allow_mnnvl = allow_mnnvl
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        options = {
            "num_bytes": num_nvl_bytes,
            "num_rdma_bytes": num_rdma_bytes,
            "low_latency_mode": low_latency_mode,
            "enable_shrink": enable_shrink,
        }
        super().__init__(group, comm, backend, timeout, topology, options)

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Say whether kernels for Hopper exist: always, they compile on first use."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set how many multiprocessors calls without a `config` use, for all buffers of this process (upstream API)."""
        if new_num_sms < 0:
            raise InvalidArgument(f"set_num_sms: new_num_sms is {new_num_sms}; it must be 0 (automatic) or more")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """Record an event on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Give the default configuration of dispatch for any rank count from 1 up."""
        return default_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Give the default configuration of combine for any rank count from 1 up."""
        return default_config(num_ranks, Buffer.num_sms)

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: Sequence[int] | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """Give this rank's communication memory as a tensor.

        Args:
            dtype: of the view.
            size: shape of the view; None for all elements that fit.
            offset: where it starts, bytes.
            use_rdma_buffer: the `num_rdma_bytes` part instead of the `num_nvl_bytes` part.

        Raises:
            InvalidArgument: the view would run past the end.
        """
        raw = self._alive("get_local_buffer_tensor").local_buffer(use_rdma_buffer)
        if size is not None and min(size, default=0) < 0:
            raise InvalidArgument(f"get_local_buffer_tensor: size is {tuple(size)}; no dimension may be below 0")
        whole = (raw.numel() - offset) // dtype.itemsize
        num_elements = whole if size is None else torch.Size(size).numel()
        if not 0 <= offset <= raw.numel() or num_elements > whole or offset % dtype.itemsize:
            raise InvalidArgument(
                f"get_local_buffer_tensor: {num_elements} x {dtype} from byte {offset} do not fit {raw.numel()} bytes, "
                f"or {offset} is not a multiple of {dtype.itemsize}"
            )
        flat = raw[offset : offset + num_elements * dtype.itemsize].view(dtype)
        return flat if size is None else flat.view(size)

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: Event | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count this rank's tokens per rank, host and expert.

        Args:
            topk_idx: [T, K] int64, -1 = no expert.
            num_experts: E.
            previous_event: start after it.
            async_finish: run on the communication stream.
            allocate_on_comm_stream: as upstream.

        Returns:
            `num_tokens_per_rank` [R] i32, `num_tokens_per_rdma_rank` [RD] i32 or None on one host,
            `num_tokens_per_expert` [E] i32, `is_token_in_rank` [T, R] bool, event.
        """
        op = "get_dispatch_layout"
        backend = self._alive(op)
        check_stream_arguments(op, previous_event, async_finish, allocate_on_comm_stream)
        num_experts = check_experts(op, num_experts, self.group_size)
        check_topk(op, topk_idx, None, None, num_experts, self._bounds)
        counted, event = self._comm_stream.run(
            lambda: backend.dispatch_layout(topk_idx, num_experts), (topk_idx,), topk_idx.is_cuda, async_finish,
            previous_event,
        )  # fmt: skip
        return (*counted, event)

    def dispatch(
        self,
        x: Payload,
        handle: NormalHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Event | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Dispatched:
        """Send every token once to each rank that owns one of its experts (compact rows).

        Args:
            x: [T, H], or `(x, sf)` with `sf` [T, n] of 4-byte elements.
            handle: of an earlier dispatch, to repeat its routing; excludes `topk_idx`, `topk_weights` and
                `num_worst_tokens`, and what else says something about routing is not read then.
            num_tokens_per_rank: [R] i32 or None; this and the three below are what `get_dispatch_layout` returned. It
                and the next are only kept in the handle, where programs may look for them.
            num_tokens_per_rdma_rank: [RD] i32 or None.
            is_token_in_rank: [T, R] bool; routes when there is no `topk_idx`.
            num_tokens_per_expert: [E] i32; says how many experts there are.
            topk_idx: [T, K] int64, optional.
            topk_weights: [T, K] float32, optional.
            expert_alignment: each count of the returned list is rounded up to it.
            num_worst_tokens: give exactly so many rows and do not wait for counts on the CPU; 0 for exact shapes.
            config: `num_sms` of it bounds the multiprocessors used.
            previous_event: start after it.
            async_finish: run on the communication stream.
            allocate_on_comm_stream: as upstream.

        Returns:
            `recv_x` (a pair if `x` was one), `recv_topk_idx` [N, K], `recv_topk_weights` [N, K], aligned counts of
            the local experts (`[]` with `num_worst_tokens`), handle, event. With `handle`: `recv_x`, four None, event.

        Raises:
            InvalidArgument: before anything is sent, on every rank.
            CommTimeout: a peer did not arrive.
        """
        op = "dispatch"
        backend = self._alive(op)
        try:  # as `_checking` does, which takes 0.3 us
            check_stream_arguments(op, previous_event, async_finish, allocate_on_comm_stream)
            if handle is not None:
                routing = routing_of(handle, (IntranodeHandle, InternodeHandle), self._owner, op)
                is_routed_again = topk_idx is not None or topk_weights is not None or num_worst_tokens != 0
                request = cached_request(x, routing, is_routed_again, _num_sms(config))
            else:
                data, sf = split_payload(op, x)
                given = Given(num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert)
                request = fresh_request(
                    data, sf, topk_idx, topk_weights, given, expert_alignment, num_worst_tokens, _num_sms(config),
                    self._bounds,
                )  # fmt: skip
        except REFUSABLE as error:
            refuse(backend, op, error)
        result, event = self._dispatch(op, backend, request, async_finish, previous_event)
        recv_x = received(result, x)
        if handle is not None:
            return recv_x, None, None, None, None, event
        new_handle = make_normal_handle(
            result,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_rank=num_tokens_per_rank,
            num_tokens_per_rdma_rank=num_tokens_per_rdma_rank,
            is_internode=self._bounds.num_scaleout_ranks > 1,
            owner=self._owner,
        )
        counts = result.num_recv_tokens_per_expert_list
        return recv_x, result.topk_idx, result.topk_weights, counts, new_handle, event

    def combine(
        self,
        x: torch.Tensor,
        handle: NormalHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: Event | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring every row home and add up, unweighted, what the ranks return (CONTRACT, 'Arithmetic of combine').

        Args:
            x: [N, H] bf16, fp16 or fp32, rows as dispatch laid them out.
            handle: of that dispatch.
            topk_weights: [N, K] float32, summed over ranks slot by slot, or None.
            bias: none, one or two [T, H] that the sum starts from.
            config: `num_sms` of it bounds the multiprocessors used.
            previous_event: start after it.
            async_finish: run on the communication stream.
            allocate_on_comm_stream: as upstream.

        Returns:
            `combined_x` [T, H], `combined_topk_weights` [T, K] or None, event. Errors as in `dispatch`.
        """
        op = "combine"
        backend = self._alive(op)
        try:  # as `_checking` does, which takes 0.3 us
            check_stream_arguments(op, previous_event, async_finish, allocate_on_comm_stream)
            routing = routing_of(handle, (IntranodeHandle, InternodeHandle), self._owner, op)
            request = combine_request(x, routing, topk_weights, bias, _num_sms(config))
        except REFUSABLE as error:
            refuse(backend, op, error)
        result, event = self._combine(op, backend, request, async_finish, previous_event)
        return result.x, result.topk_weights, event


def _num_sms(config: Config | None) -> int:
    return Buffer.num_sms if config is None else config.num_sms
