"""What a dispatch hands to the user for later: tuples with upstream's lengths and positions, and the routing inside.

Clients read `handle[0]` of `IntranodeHandle` and `handle[-4]` of `InternodeHandle`; the other positions hold the
nearest thing there is here to upstream's ring bookkeeping, or None where nothing corresponds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from deepep.errors import InvalidArgument

if TYPE_CHECKING:
    from deepep.backends.base import DispatchResult, Routing


class _IntranodeFields(NamedTuple):
    rank_prefix_matrix: torch.Tensor | None  # [R, R] i32: rows from i at j are [m[i-1][j], m[i][j])
    channel_prefix_matrix: torch.Tensor | None  # [R, 1] i32: tokens sent to each rank, one channel
    recv_channel_prefix_matrix: torch.Tensor  # [R, 1] i32: end of each source rank's rows
    recv_src_idx: torch.Tensor  # [N] i32: token number at the source
    is_token_in_rank: torch.Tensor | None  # [T, R] bool
    send_head: torch.Tensor  # [T, S] i32: row at the destination, -1 if none


class _InternodeFields(NamedTuple):
    is_token_in_rank: torch.Tensor | None  # [T, R] bool
    rdma_channel_prefix_matrix: torch.Tensor | None  # [RD, 1] i32: tokens sent to each host, one channel
    gbl_channel_prefix_matrix: torch.Tensor | None  # [R, 1] i32: tokens sent to each rank, one channel
    recv_rdma_channel_prefix_matrix: None
    recv_rdma_rank_prefix_sum: None
    recv_gbl_channel_prefix_matrix: torch.Tensor  # [R, 1] i32: end of each source rank's rows
    recv_gbl_rank_prefix_sum: torch.Tensor  # [R] i32: the same, inclusive
    recv_src_meta: torch.Tensor  # [N] i32: token number at the source
    send_rdma_head: None
    send_nvl_head: torch.Tensor  # [T, S] i32: row at the destination, -1 if none


class _LowLatencyFields(NamedTuple):
    src_info: torch.Tensor  # [L, R*M] i32
    layout_range: torch.Tensor  # [L, R] i64, begin << 32 | count
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int


class IntranodeHandle(_IntranodeFields):
    """Handle of `Buffer.dispatch` within one scale-up domain (upstream API: six items)."""

    routing: Routing
    owner: int
    has_tail: bool  # shapes are worst-case: rows past the last that arrived hold nothing


class InternodeHandle(_InternodeFields):
    """Handle of `Buffer.dispatch` across hosts (upstream API: ten items)."""

    routing: Routing
    owner: int
    has_tail: bool


class LowLatencyHandle(_LowLatencyFields):
    """Handle of `Buffer.low_latency_dispatch` (upstream API: five items)."""

    routing: Routing
    owner: int


NormalHandle = IntranodeHandle | InternodeHandle


def make_normal_handle(
    result: DispatchResult,
    *,
    is_token_in_rank: torch.Tensor | None,
    num_tokens_per_rank: torch.Tensor | None,
    num_tokens_per_rdma_rank: torch.Tensor | None,
    is_internode: bool,
    owner: int,
) -> NormalHandle:
    """Wrap the routing of a dispatch in upstream's tuple; `owner` identifies backend and processes."""
    routing = result.routing
    psum = routing.psum_num_recv_tokens_per_rank
    sent = _as_column(num_tokens_per_rank)
    handle: NormalHandle
    if is_internode:
        sent_hosts = _as_column(num_tokens_per_rdma_rank)
        handle = InternodeHandle(
            is_token_in_rank, sent_hosts, sent, None, None, psum[:, None], psum, routing.recv_src_token, None,
            routing.dst_row,
        )  # fmt: skip
    else:
        handle = IntranodeHandle(
            result.rank_prefix_matrix, sent, psum[:, None], routing.recv_src_token, is_token_in_rank, routing.dst_row
        )
    handle.routing = routing
    handle.owner = owner
    handle.has_tail = not result.num_recv_tokens_per_expert_list
    return handle


def make_low_latency_handle(result: DispatchResult, hidden: int, owner: int) -> LowLatencyHandle:
    """Wrap the routing of a low-latency dispatch in upstream's tuple."""
    routing = result.routing
    if result.src_info is None or result.layout_range is None:
        raise TypeError("a padded DispatchResult must hold src_info and layout_range")
    handle = LowLatencyHandle(
        result.src_info, result.layout_range, routing.num_max_tokens_per_rank, hidden, routing.num_experts
    )
    handle.routing = routing
    handle.owner = owner
    return handle


def routing_of(handle: object, kind: tuple[type, ...], owner: int, op: str) -> Routing:
    """Take the routing out of a handle.

    Raises:
        InvalidArgument: not a handle of this kind, or of another backend or other processes.
    """
    if not isinstance(handle, kind):
        wanted = " or ".join(k.__name__ for k in kind)
        raise InvalidArgument(f"{op}: handle is a {type(handle).__name__}; pass the {wanted} that dispatch returned")
    if handle.owner != owner:  # type: ignore[attr-defined]
        raise InvalidArgument(
            f"{op}: handle is of another backend or other ranks; use it with the buffer that dispatched, or its like"
        )
    return handle.routing  # type: ignore[attr-defined]


def _as_column(counts: torch.Tensor | None) -> torch.Tensor | None:
    return None if counts is None else counts.view(-1, 1)
