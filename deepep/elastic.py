"""`ElasticBuffer`: the second-generation surface, another spelling of the requests that `Buffer` states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from deepep.backends.base import (
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    Layout,
    Reduction,
    Routing,
    WeightSource,
)
from deepep.elastic_absent import AbsentMixin, refuse_cpu_bytes
from deepep.elastic_handle import (
    EPHandle,
    HandleTensors,
    check_handle,
    column_major,
    handle_tensors,
    make_handle,
    num_rows_of,
    rebuild_routing,
)
from deepep.elastic_requests import Named, cached_terms, fresh_terms
from deepep.elastic_sizes import SizesMixin, check_num_bytes
from deepep.errors import DeepEPError, InvalidArgument, UnsupportedOperation
from deepep.event import Event, EventHandle, EventOverlap, as_handle
from deepep.front import Front
from deepep.topology import Topology
from deepep.validate import (
    COMBINE_DTYPES,
    Payload,
    check_bias,
    check_rows,
    check_weights,
    received,
    split_payload,
    wrong_kind,
)

__all__ = ["EPHandle", "ElasticBuffer"]

_DEFAULT_QPS = {True: 65, False: 17}  # across hosts, within one


class ElasticBuffer(SizesMixin, AbsentMixin, Front):
    """Dispatch tokens to experts, compact or expanded, and combine what comes back (CONTRACT, '`ElasticBuffer`').

    Construction is collective. Arguments up to `explicitly_destroy` are upstream's; those after it are this library's.

    Args:
        group: torch ProcessGroup of any kind.
        num_bytes: size of the windows, bytes; None derives it from the four arguments after the next.
        num_cpu_bytes: not here; raises `UnsupportedOperation` unless 0.
        num_max_tokens_per_rank: M that calls use unless they name another.
        hidden: H, most channels of a row.
        num_topk: K; 0 for unknown.
        use_fp8_dispatch: size the windows for FP8 rows.
        deterministic: rows always lie in ascending (source rank, source token) order, whatever this says.
        allow_hybrid_mode: across hosts, add up each host's rows before they travel; False treats all ranks alike.
        allow_multiple_reduction: add up one token's rows on one rank (and host) before they travel; False sends every
            row and rounds once.
        prefer_overlap_with_compute: take few multiprocessors by default; False takes more.
        sl_idx: kept for programs that pass it; the network is the backend's business.
        num_allocated_qps: likewise; 0 for the usual number.
        num_cpu_timeout_secs: likewise; `timeout` is the one limit.
        num_gpu_timeout_secs: `timeout` where neither that nor `DEEPEP_TIMEOUT` is given, seconds.
        explicitly_destroy: kept for programs that pass it; `destroy()` may be called either way, and twice.
        comm: mpi4py communicator, instead of `group`.
        backend: "auto" or a name of `python -m deepep doctor`; `DEEPEP_BACKEND` where not given.
        timeout: longest wait for a peer, seconds.
        topology: who shares a host; found out where not given.

    Raises:
        InvalidArgument: arguments are wrong, or ranks disagree about them.
        BackendUnavailable: the backend cannot run here.
        CommTimeout: a rank did not come to construct its buffer.
    """

    def __init__(
        self,
        group: Any = None,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
        *,
        comm: Any = None,
        backend: str | None = None,
        timeout: float | None = None,
        topology: Topology | None = None,
    ) -> None:
        problem: DeepEPError | None = None
        try:
            if num_cpu_bytes:
                refuse_cpu_bytes()
            if num_bytes is None:
                num_bytes = self.get_buffer_size_hint(
                    comm if group is None else group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch,
                    allow_hybrid_mode, allow_multiple_reduction,
                )  # fmt: skip
            check_num_bytes(num_bytes)
        except (InvalidArgument, UnsupportedOperation) as error:
            problem, num_bytes = error, 0
        except (AttributeError, TypeError, ValueError) as error:
            problem, num_bytes = wrong_kind("ElasticBuffer", error), 0
        self.num_bytes, self.num_cpu_bytes = num_bytes, num_cpu_bytes
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk
        self.use_fp8_dispatch, self.deterministic = use_fp8_dispatch, deterministic
        self.allow_hybrid_mode, self.allow_multiple_reduction = allow_hybrid_mode, allow_multiple_reduction
        self.prefer_overlap_with_compute, self.explicitly_destroy = prefer_overlap_with_compute, explicitly_destroy
        self.sl_idx = sl_idx
        self.num_cpu_timeout_secs, self.num_gpu_timeout_secs = num_cpu_timeout_secs, num_gpu_timeout_secs
        options = {
            "num_bytes": num_bytes,
            "num_max_tokens_per_rank": num_max_tokens_per_rank,
            "hidden": hidden,
            "num_topk": num_topk,
            "allow_hybrid_mode": allow_hybrid_mode,
        }
        super().__init__(
            group, comm, backend, timeout, topology, options, default_timeout=num_gpu_timeout_secs, problem=problem
        )
        self.rank_idx, self.num_ranks = self.rank, self.group_size
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = divmod(self.rank, self.num_scaleup_ranks)
        self.num_allocated_qps = num_allocated_qps or _DEFAULT_QPS[self.num_scaleout_ranks > 1]

    @staticmethod
    def capture() -> EventHandle:
        """Record an event on the current stream."""
        return EventHandle()

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Let work go on only once every rank has come here.

        Args:
            use_comm_stream: wait on the communication stream instead of the current one.
            with_cpu_sync: return only when it is over.
            sequential: the current stream waits for the communication stream afterwards.
        """
        backend = self._alive("barrier")
        on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        _, event = self._run(backend.barrier, (), on_cuda, use_comm_stream, None)
        if sequential or with_cpu_sync:
            event.current_stream_wait()
        if with_cpu_sync and on_cuda:
            torch.cuda.current_stream().synchronize()

    def dispatch(
        self,
        x: Payload,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,  # noqa: ARG002 - queue pairs are the backend's business
        previous_event: Event | None = None,
        previous_event_before_epilogue: Event | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,  # noqa: ARG002 - memory is safe on both streams either way
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool | None = None,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Payload, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]:
        """Send every token to the ranks of its experts.

        Args:
            x: [T, H], T <= M, or `(x, sf)` with `sf` [T, n] of 4-byte elements.
            topk_idx: [T, K] int64, -1 = no expert; None with `handle`.
            topk_weights: [T, K] float32, optional, also with `handle`.
            cumulative_local_expert_recv_stats: [L] int32, the real counts are added to it; not with `handle`.
            num_experts: E; needed without `handle`.
            num_max_tokens_per_rank: M, equal on all ranks; the constructor's where not given.
            expert_alignment: rows each expert's group is aligned to; 1 where not given.
            num_sms: most multiprocessors to use; 0 for the handle's, or `get_theoretical_num_sms`.
            num_qps: kept for programs that pass it.
            previous_event: start after it.
            previous_event_before_epilogue: likewise; there is no epilogue apart from the rest.
            async_with_compute_stream: run on the communication stream.
            allocate_on_comm_stream: as upstream.
            handle: of an earlier dispatch, to repeat its routing without CPU sync; arguments that it holds may be left
                out, and must be equal where given.
            do_handle_copy: the handle keeps a copy of `topk_idx`, not the tensor itself.
            do_cpu_sync: wait for counts and give exact shapes (default); False gives worst-case shapes.
            do_expand: expanded rows instead of compact ones.
            do_zero_padding: zero the rows between experts.
            use_tma_aligned_col_major_sf: received `sf` has strides (1, rows rounded up to 4).

        Returns:
            `recv_x` (a pair if `x` was one); `recv_topk_idx` [N, K], None if expanded; `recv_topk_weights` [N, K], or
            [rows] if expanded, or None; handle (the same one if given); event.

        Raises:
            InvalidArgument: before anything is sent, on every rank.
            CommTimeout: a peer did not arrive.
        """
        op = "dispatch"
        named = Named(num_experts, num_max_tokens_per_rank, expert_alignment, do_expand)
        with self._checking(op) as backend:
            data, sf = split_payload(op, x)
            if handle is not None:
                routing = check_handle(op, handle, self.num_ranks, self._owner)
                terms = cached_terms(data, sf, handle, routing, topk_idx, topk_weights, named, do_cpu_sync)
            else:
                stats = cumulative_local_expert_recv_stats
                exact = do_cpu_sync is None or do_cpu_sync
                terms = fresh_terms(
                    data, sf, topk_idx, topk_weights, stats, named, exact, self.num_max_tokens_per_rank, self._bounds
                )
            terms["num_sms"] = self._num_sms(op, num_sms, handle, terms)
        terms["do_zero_padding"] = do_zero_padding
        self._fit(op, backend, data, terms["layout"])
        before = as_handle(previous_event_before_epilogue)
        inputs = (terms,) if handle is None else (terms, vars(handle))

        def work() -> tuple[DispatchResult, HandleTensors | None]:
            if before is not None:
                before.current_stream_wait()
            if handle is not None and terms["routing"] is None:
                terms["routing"] = self._rebuild(handle)
            result = backend.dispatch(DispatchRequest(**terms))
            if handle is None and do_handle_copy:
                # Only now, so that no kernel waits for it.
                routing = replace(result.routing, topk_idx=terms["topk_idx"].clone())
                result = replace(result, routing=routing)
            if use_tma_aligned_col_major_sf and result.sf is not None:
                result = replace(result, sf=column_major(result.sf))
            return result, handle_tensors(result, self.num_scaleup_ranks) if handle is None else None

        (result, tensors), event = self._run(work, inputs, data.is_cuda, async_with_compute_stream, previous_event)
        if handle is None:
            exact = terms["num_worst_rows"] is None
            handle = make_handle(result, tensors, exact, terms["num_sms"], self.num_ranks, self._owner)
        recv_x = received(result, x)
        return recv_x, result.topk_idx, result.topk_weights, handle, event

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,  # noqa: ARG002 - as in dispatch
        previous_event: Event | None = None,
        previous_event_before_epilogue: Event | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,  # noqa: ARG002 - as in dispatch
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring every row home and add up, unweighted, what the ranks return (CONTRACT, 'Arithmetic of combine').

        Args:
            x: [N, H] compact or [rows, H] expanded rows as dispatch laid them out; bf16, fp16 or fp32.
            handle: of that dispatch.
            topk_weights: [N, K] compact or [rows] expanded, float32: brought back, not applied; or None.
            bias: none, one or two [T, H] that the sum starts from.
            num_sms: most multiprocessors to use; 0 for the handle's.
            num_qps: kept for programs that pass it.
            previous_event: start after it.
            previous_event_before_epilogue: likewise.
            async_with_compute_stream: run on the communication stream.
            allocate_on_comm_stream: as upstream.

        Returns:
            `combined_x` [T, H]; `combined_topk_weights` [T, K], each slot as the owner of its expert gave it and 0
            in empty slots, or None; event. Errors as in `dispatch`.
        """
        op = "combine"
        with self._checking(op) as backend:
            known = check_handle(op, handle, self.num_ranks, self._owner)
            (num_tokens, num_topk), device = handle.topk_idx.shape, handle.topk_idx.device
            check_rows(op, "x", x, num_rows_of(handle), device)
            if x.dtype not in COMBINE_DTYPES:
                raise InvalidArgument(f"{op}: x is {x.dtype}; sums are over bfloat16, float16 or float32")
            if topk_weights is not None:
                shape = x.shape[:1] if handle.do_expand else (x.shape[0], num_topk)
                check_weights(op, topk_weights, shape, device)
            biases = check_bias(op, bias, x, num_tokens)
            num_sms = self._num_sms(op, num_sms, handle, {})
        self._fit(op, backend, x, Layout.EXPANDED if handle.do_expand else Layout.COMPACT)
        # For compact rows this says something only where hosts would add up first.
        is_per_copy = not self.allow_multiple_reduction and (handle.do_expand or self.num_scaleout_ranks > 1)
        before = as_handle(previous_event_before_epilogue)

        def work() -> tuple[CombineResult, Routing]:
            if before is not None:
                before.current_stream_wait()
            routing = known or self._rebuild(handle)
            request = CombineRequest(
                x, routing, topk_weights=topk_weights, weight_source=WeightSource.OWNER, bias=biases,
                reduction=Reduction.PER_COPY if is_per_copy else Reduction.PER_RANK, num_sms=num_sms,
            )  # fmt: skip
            return backend.combine(request), routing

        inputs = (x, topk_weights, biases, vars(handle))
        (result, _), event = self._run(work, inputs, x.is_cuda, async_with_compute_stream, previous_event)
        return result.x, result.topk_weights, event

    def _num_sms(self, op: str, num_sms: int, handle: EPHandle | None, terms: dict[str, Any]) -> int:
        if num_sms < 0:
            raise InvalidArgument(f"{op}: num_sms is {num_sms}; it must be 0 (automatic) or more")
        if num_sms:
            return num_sms
        if handle is not None:
            return handle.num_sms
        return self.get_theoretical_num_sms(terms["num_experts"], terms["topk_idx"].shape[1])

    def _rebuild(self, handle: EPHandle) -> Routing:
        return rebuild_routing(handle, self.num_ranks, self.num_scaleup_ranks, self._owner)
