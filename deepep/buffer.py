"""`Buffer`: the first-generation surface. Each method checks its arguments, states a request and unpacks the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from deepep.backends.base import CombineRequest, DispatchRequest, Routing
from deepep.config import Config, default_config
from deepep.errors import InvalidArgument
from deepep.event import Event, EventHandle, EventOverlap
from deepep.front import Front
from deepep.handle import InternodeHandle, IntranodeHandle, NormalHandle, make_normal_handle, routing_of
from deepep.layout import dispatch_layout, token_in_rank, topk_ranks
from deepep.low_latency import LowLatencyMixin
from deepep.stream import check_stream_arguments
from deepep.topology import Topology
from deepep.validate import (
    COMBINE_DTYPES,
    Payload,
    check_bias,
    check_experts,
    check_rows,
    check_tensor,
    check_topk,
    check_weights,
    describe,
    split_payload,
    values_are_checked,
)

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
        low_latency_mode: prepare the low-latency operations.
        num_qps_per_rank: kept for programs that pass it; network queues are the backend's business.
        allow_nvlink_for_low_latency_mode: likewise.
        allow_mnnvl: likewise.
        explicitly_destroy: likewise; `destroy()` may be called either way.
        enable_shrink: a rank that does not arrive in low-latency mode is masked instead of raising.
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
        check_experts(op, num_experts, self.group_size)
        check_topk(op, topk_idx, None, None, num_experts, backend.capabilities().max_topk)
        counted, event = self._comm_stream.run(
            lambda: dispatch_layout(topk_idx, num_experts, self.group_size, self.topology.num_scaleup_ranks),
            (topk_idx,), is_async=async_finish, previous_event=previous_event, on_cuda=topk_idx.is_cuda,
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
            handle: of an earlier dispatch, to repeat its routing; excludes everything about routing below.
            num_tokens_per_rank: [R] i32 and the three below are what `get_dispatch_layout` returned.
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
        with self._checking(op):
            check_stream_arguments(op, previous_event, async_finish, allocate_on_comm_stream)
            data, sf = split_payload(op, x)
            if handle is not None:
                routing = self._cached_routing(op, handle, data, topk_idx, topk_weights, num_worst_tokens)
                request = DispatchRequest(
                    data, sf, None, None, routing.num_experts, routing=routing, num_sms=_num_sms(config)
                )
            else:
                num_experts = self._check_routing(
                    op, data, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert
                )
                if expert_alignment < 1 or num_worst_tokens < 0:
                    raise InvalidArgument(
                        f"{op}: expert_alignment={expert_alignment}, num_worst_tokens={num_worst_tokens}; "
                        "the first must be at least 1, the second at least 0"
                    )
                request = DispatchRequest(
                    data, sf, topk_idx, topk_weights, num_experts,
                    is_token_in_rank=is_token_in_rank if topk_idx is None else None,
                    num_tokens_per_expert=num_tokens_per_expert if topk_idx is None else None,
                    expert_alignment=expert_alignment, num_worst_rows=num_worst_tokens or None,
                    num_sms=_num_sms(config),
                )  # fmt: skip
        result, event = self._dispatch(op, request, async_finish, previous_event)
        recv_x = result.x if result.sf is None else (result.x, result.sf)
        if handle is not None:
            return recv_x, None, None, None, None, event
        new_handle = make_normal_handle(
            result,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_rank=num_tokens_per_rank,
            num_tokens_per_rdma_rank=num_tokens_per_rdma_rank,
            is_internode=self.topology.num_scaleout_ranks > 1,
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
        with self._checking(op):
            check_stream_arguments(op, previous_event, async_finish, allocate_on_comm_stream)
            routing = routing_of(handle, (IntranodeHandle, InternodeHandle), self._owner, op)
            check_rows(op, "x", x, routing.num_recv_tokens)
            if x.dtype not in COMBINE_DTYPES:
                raise InvalidArgument(f"{op}: x is {x.dtype}; sums are over bfloat16, float16 or float32")
            if topk_weights is not None:
                check_weights(op, topk_weights, (x.shape[0], _num_topk(routing, topk_weights)), x.device)
            biases = check_bias(op, bias, x, routing.dst_rank.shape[0])
            request = CombineRequest(x, routing, topk_weights, bias=biases, num_sms=_num_sms(config))
        result, event = self._combine(op, request, async_finish, previous_event)
        return result.x, result.topk_weights, event

    def _cached_routing(
        self, op: str, handle: object, x: torch.Tensor, topk_idx: object, topk_weights: object, num_worst_tokens: int
    ) -> Routing:
        routing = routing_of(handle, (IntranodeHandle, InternodeHandle), self._owner, op)
        if topk_idx is not None or topk_weights is not None or num_worst_tokens:
            raise InvalidArgument(f"{op}: handle repeats a routing; leave out topk_idx, topk_weights, num_worst_tokens")
        check_rows(op, "x", x, routing.dst_rank.shape[0])
        return routing

    def _check_routing(
        self,
        op: str,
        x: torch.Tensor,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        is_token_in_rank: torch.Tensor | None,
        num_tokens_per_expert: torch.Tensor | None,
    ) -> int:
        if num_tokens_per_expert is None or (topk_idx is None and is_token_in_rank is None):
            raise InvalidArgument(
                f"{op}: without a handle, num_tokens_per_expert and one of topk_idx and is_token_in_rank are needed; "
                "pass what get_dispatch_layout returned"
            )
        num_experts = num_tokens_per_expert.numel() if isinstance(num_tokens_per_expert, torch.Tensor) else 0
        if num_experts == 0:
            raise InvalidArgument(
                f"{op}: num_tokens_per_expert is {describe(num_tokens_per_expert)}; it must be an int32 tensor [E]"
            )
        check_experts(op, num_experts, self.group_size)
        check_tensor(op, "num_tokens_per_expert", num_tokens_per_expert, torch.int32, (num_experts,), x.device)
        shape = (x.shape[0], self.group_size)
        if is_token_in_rank is not None:
            check_tensor(op, "is_token_in_rank", is_token_in_rank, torch.bool, shape, x.device)
        if topk_idx is None:
            if topk_weights is not None:
                raise InvalidArgument(f"{op}: topk_weights without topk_idx; pass both or neither")
            return num_experts
        max_topk = self._alive(op).capabilities().max_topk
        check_topk(op, topk_idx, topk_weights, x.shape[0], num_experts, max_topk, x.device)
        if is_token_in_rank is not None and values_are_checked(topk_idx):
            implied = token_in_rank(topk_ranks(topk_idx, num_experts // self.group_size), self.group_size)
            if not torch.equal(implied, is_token_in_rank):
                raise InvalidArgument(f"{op}: is_token_in_rank does not follow from topk_idx; use get_dispatch_layout")
        return num_experts


def _num_topk(routing: Routing, topk_weights: torch.Tensor) -> int:
    """Give the K that weights must have: the dispatch's, or their own where it had none."""
    if routing.topk_idx is not None:
        return routing.topk_idx.shape[1]
    return topk_weights.shape[-1] if isinstance(topk_weights, torch.Tensor) and topk_weights.dim() else 0


def _num_sms(config: Config | None) -> int:
    return Buffer.num_sms if config is None else config.num_sms
