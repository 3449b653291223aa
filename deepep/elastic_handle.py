"""`EPHandle`: what an `ElasticBuffer` dispatch leaves with the user, and the way from it back to a `Routing`.

All state lies in upstream's field names, so that programs may save the fields, clear them and put them back, also into
the handle of another dispatch of the same tokens. Whatever is remembered beside them is only a shortcut.
"""

from __future__ import annotations

import operator
from itertools import repeat
from typing import Any, NamedTuple

import torch

from deepep.backends.base import DispatchResult, Layout, Routing
from deepep.errors import InvalidArgument
from deepep.layout import align, num_expanded_rows_at_most, topk_ranks
from deepep.validate import check_tensor, topk_idx_t


class EPHandle:
    """Routing of one dispatch, for cached dispatches and for `combine` (upstream API). Plain and mutable.

    Args, all of them attributes:
        do_expand: rows are expanded, else compact.
        num_experts: E.
        expert_alignment: rows each expert's group is aligned to.
        num_max_tokens_per_rank: M.
        num_sms: multiprocessors the dispatch used; calls that repeat it use as many.
        topk_idx: [T, K] int64 at the source.
        num_recv_tokens: N, compact rows received, or allocated where shapes are worst-case.
        num_expanded_tokens: rows of the expanded layout, with padding, likewise.
        num_recv_tokens_per_expert_list: aligned counts, Python ints; [] where shapes are worst-case.
        psum_num_recv_tokens_per_scaleup_rank: [SU] int32, inclusive; the last is the number of real compact rows.
        psum_num_recv_tokens_per_expert: [L] int32; compact: inclusive over aligned counts; expanded: aligned start of
            the expert plus its real count.
        num_unaligned_recv_tokens_per_expert: [L] int32, real counts.
        recv_src_metadata: [N, K + 2] int32; column 0: `src_rank * M + src_token`, column 1: the source rank, columns
            2 to K + 1: expanded row of each top-k position; -1 where there is none, and in the tail.
        dst_buffer_slot_idx: [T, K] int32, compact row at the destination, at the highest position that chose the rank;
            -1 elsewhere.
        token_metadata_at_forward: None; nothing here needs it.
        channel_linked_list: likewise.
    """

    recv_src_metadata: torch.Tensor
    cached_recv_src_metadata_before_sort: torch.Tensor | None = None  # rows are never sorted: they arrive in order

    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: torch.Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: torch.Tensor,
        psum_num_recv_tokens_per_expert: torch.Tensor,
        num_unaligned_recv_tokens_per_expert: torch.Tensor,
        recv_src_metadata: torch.Tensor | None,
        dst_buffer_slot_idx: torch.Tensor,
        token_metadata_at_forward: torch.Tensor | None = None,
        channel_linked_list: torch.Tensor | None = None,
    ) -> None:
        self.do_expand = do_expand
        self.num_experts = num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        self.num_recv_tokens = num_recv_tokens
        self.num_expanded_tokens = num_expanded_tokens
        self.num_recv_tokens_per_expert_list = num_recv_tokens_per_expert_list
        self.psum_num_recv_tokens_per_scaleup_rank = psum_num_recv_tokens_per_scaleup_rank
        self.psum_num_recv_tokens_per_expert = psum_num_recv_tokens_per_expert
        self.num_unaligned_recv_tokens_per_expert = num_unaligned_recv_tokens_per_expert
        if recv_src_metadata is not None:
            self.recv_src_metadata = recv_src_metadata
        self.dst_buffer_slot_idx = dst_buffer_slot_idx
        self.token_metadata_at_forward = token_metadata_at_forward
        self.channel_linked_list = channel_linked_list
        self._known: _Known | None = None

    def __getattr__(self, name: str) -> Any:
        # Only for what is missing: the metadata of a fresh handle is written down when somebody first asks for it,
        # since its kernels would cost every dispatch more time than a decode step has.
        known = self.__dict__.get("_known") if name == "recv_src_metadata" else None
        if known is None:
            raise AttributeError(f"EPHandle has no attribute {name!r}")
        metadata = _metadata(known.routing)
        self.recv_src_metadata = metadata
        # Only this field: the client may have changed others meanwhile.
        place = _ROUTING_FIELDS.index(name)
        self._known = known._replace(fields=(*known.fields[:place], metadata, *known.fields[place + 1 :]))
        return metadata


_ROUTING_FIELDS = (
    "do_expand",
    "num_experts",
    "expert_alignment",
    "num_max_tokens_per_rank",
    "topk_idx",
    "num_recv_tokens",
    "num_expanded_tokens",
    "psum_num_recv_tokens_per_scaleup_rank",
    "recv_src_metadata",
    "dst_buffer_slot_idx",
)
_ABSENT = object()


class _Known(NamedTuple):
    """A routing, whom it is for, and the very objects the handle's fields were when it was made of them."""

    routing: Routing
    owner: int
    fields: tuple[object, ...]


class HandleTensors(NamedTuple):
    """Fields of a handle that are worked out on the stream of the dispatch."""

    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    psum_num_recv_tokens_per_expert: torch.Tensor
    num_unaligned_recv_tokens_per_expert: torch.Tensor


def handle_tensors(result: DispatchResult, num_scaleup_ranks: int) -> HandleTensors:
    """Work out, on the device, what counts of a fresh dispatch its backend has not."""
    counts = result.num_recv_tokens_per_expert
    if counts is None:
        raise TypeError("a fresh DispatchResult must hold num_recv_tokens_per_expert")
    alignment = result.routing.expert_alignment
    if result.psum_num_recv_tokens_per_expert is not None:
        per_expert = result.psum_num_recv_tokens_per_expert
    elif alignment == 1:
        per_expert = counts.cumsum(0, dtype=torch.int32)
    else:
        aligned = torch.div(counts + (alignment - 1), alignment, rounding_mode="floor") * alignment
        per_expert = aligned.cumsum(0, dtype=torch.int32)
        if result.routing.layout is Layout.EXPANDED:
            per_expert = per_expert - aligned + counts
    per_rank = result.routing.psum_num_recv_tokens_per_rank
    if num_scaleup_ranks < per_rank.numel():
        arriving = per_rank.diff(prepend=per_rank.new_zeros(1))
        per_rank = arriving.view(-1, num_scaleup_ranks).sum(0).cumsum(0, dtype=torch.int32)
    return HandleTensors(per_rank, per_expert, counts)


def make_handle(
    result: DispatchResult, tensors: HandleTensors | None, exact: bool, num_sms: int, num_ranks: int, owner: int
) -> EPHandle:
    """Write a fresh dispatch down; `exact` says that shapes are, `owner` identifies backend and processes."""
    routing = result.routing
    if tensors is None:
        raise TypeError("a fresh dispatch needs the tensors of its handle")
    topk_idx, counts = routing.topk_idx, result.num_recv_tokens_per_expert_list
    if topk_idx is None:
        raise TypeError("the Routing of a dispatch with top-k must hold topk_idx")
    if exact:
        num_expanded = sum(counts)
    else:
        num_local, alignment = routing.num_experts // num_ranks, routing.expert_alignment
        num_expanded = num_expanded_rows_at_most(routing.num_recv_tokens, topk_idx.shape[1], num_local, alignment)
    handle = EPHandle(
        routing.layout is Layout.EXPANDED, routing.num_experts, routing.expert_alignment,
        routing.num_max_tokens_per_rank, num_sms, topk_idx, routing.num_recv_tokens, num_expanded, counts,
        *tensors, recv_src_metadata=None, dst_buffer_slot_idx=routing.dst_row,
    )  # fmt: skip
    handle._known = _Known(routing, owner, _fields(handle))
    return handle


def check_handle(op: str, handle: object, num_ranks: int, owner: int) -> Routing | None:
    """Check that a handle can be used on this group.

    Returns:
        The routing it was made of, if its fields are still the same objects, and of the same owner; else None.

    Raises:
        InvalidArgument: not an `EPHandle`, a field is missing or has another shape than it must have.
    """
    if not isinstance(handle, EPHandle):
        raise InvalidArgument(f"{op}: handle is a {type(handle).__name__}; pass the EPHandle that dispatch returned")
    known = handle._known
    if known is not None and _are(known.fields, handle):
        return known.routing if known.owner == owner else None
    topk_idx = handle.topk_idx
    if not isinstance(topk_idx, torch.Tensor) or topk_idx.dim() != 2 or topk_idx.dtype != topk_idx_t:
        raise InvalidArgument(f"{op}: handle.topk_idx must be [T, K] {topk_idx_t}; put back what the handle held")
    num_topk, device = topk_idx.shape[1], topk_idx.device
    metadata = vars(handle).get("recv_src_metadata", _ABSENT)
    if metadata is not _ABSENT or handle._known is None:
        num_recv = metadata.shape[0] if isinstance(metadata, torch.Tensor) and metadata.dim() == 2 else 0
        check_tensor(op, "handle.recv_src_metadata", metadata, torch.int32, (num_recv, num_topk + 2), device)
    shape = tuple(topk_idx.shape)
    check_tensor(op, "handle.dst_buffer_slot_idx", handle.dst_buffer_slot_idx, torch.int32, shape, device)
    psum = handle.psum_num_recv_tokens_per_scaleup_rank
    num_scaleup = psum.numel() if isinstance(psum, torch.Tensor) else num_ranks
    check_tensor(op, "handle.psum_num_recv_tokens_per_scaleup_rank", psum, torch.int32, (num_scaleup,), device)
    if num_scaleup == 0 or num_ranks % num_scaleup or handle.num_experts % num_ranks:
        raise InvalidArgument(
            f"{op}: handle is for {handle.num_experts} experts and domains of {num_scaleup} ranks; this group has "
            f"{num_ranks} ranks"
        )
    return None


def num_rows_of(handle: EPHandle) -> int:
    """Rows of `x` that belong to a handle: expanded, or as many compact ones as its metadata describes."""
    if handle.do_expand:
        return handle.num_expanded_tokens
    metadata = vars(handle).get("recv_src_metadata")
    return handle.num_recv_tokens if metadata is None else metadata.shape[0]


def rebuild_routing(handle: EPHandle, num_ranks: int, num_scaleup_ranks: int, owner: int) -> Routing:
    """Make a routing of the handle's fields alone, on the current stream, and remember it.

    Never waits for a GPU: the fields alone say everything, shapes included.
    """
    metadata, slots = handle.recv_src_metadata, handle.dst_buffer_slot_idx
    ranks = topk_ranks(handle.topk_idx, handle.num_experts // num_ranks)
    source, token = metadata[:, 1], metadata[:, 0] - metadata[:, 1] * handle.num_max_tokens_per_rank
    psum = handle.psum_num_recv_tokens_per_scaleup_rank
    if num_scaleup_ranks < num_ranks:
        # Counts of a scale-up rank are over all domains: those of single ranks stand in the metadata only. The tail's
        # -1 lands in a column that is cut off.
        ends = metadata.new_zeros(num_ranks + 1)
        index = torch.where(source >= 0, source, num_ranks).to(torch.int64)
        ends.scatter_add_(0, index, torch.ones_like(source))
        psum = ends[:-1].cumsum(0, dtype=torch.int32)
    routing = Routing(
        layout=Layout.EXPANDED if handle.do_expand else Layout.COMPACT,
        num_experts=handle.num_experts,
        num_max_tokens_per_rank=handle.num_max_tokens_per_rank,
        expert_alignment=handle.expert_alignment,
        num_recv_tokens=metadata.shape[0],
        num_rows=handle.num_expanded_tokens if handle.do_expand else metadata.shape[0],
        topk_idx=handle.topk_idx,
        dst_rank=torch.where(slots >= 0, ranks, -1).to(torch.int32),
        dst_row=slots,
        psum_num_recv_tokens_per_rank=psum,
        recv_src_token=torch.where(source >= 0, token, -1),
        expanded_row=metadata[:, 2:].contiguous() if handle.do_expand else None,
    )
    handle._known = _Known(routing, owner, _fields(handle))
    return routing


def column_major(sf: torch.Tensor) -> torch.Tensor:
    """Copy scale factors [rows, n] to strides (1, rows rounded up to 4), the layout that TMA loads of GEMMs want."""
    num_rows, num_sf = sf.shape
    out = torch.empty(num_sf, align(num_rows, 4), dtype=sf.dtype, device=sf.device)[:, :num_rows].t()
    return out.copy_(sf)


def _fields(handle: EPHandle) -> tuple[object, ...]:
    return tuple(map(vars(handle).get, _ROUTING_FIELDS, repeat(_ABSENT)))


def _are(fields: tuple[object, ...], handle: EPHandle) -> bool:
    return all(map(operator.is_, fields, _fields(handle)))


def _metadata(routing: Routing) -> torch.Tensor:
    token, psum, topk_idx = routing.recv_src_token, routing.psum_num_recv_tokens_per_rank, routing.topk_idx
    if topk_idx is None:
        raise TypeError("the Routing of a dispatch with top-k must hold topk_idx")
    out = token.new_full((routing.num_recv_tokens, topk_idx.shape[1] + 2), -1)
    row = torch.arange(routing.num_recv_tokens, dtype=psum.dtype, device=psum.device)
    source = torch.searchsorted(psum, row, right=True).to(torch.int32)
    is_real = token >= 0
    out[:, 0] = torch.where(is_real, source * routing.num_max_tokens_per_rank + token, -1)
    out[:, 1] = torch.where(is_real, source, -1)
    if routing.expanded_row is not None:
        out[:, 2:] = routing.expanded_row
    return out
