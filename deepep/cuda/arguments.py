"""The structs of `csrc/include/deepep/layout.cuh`, member by member; a unit test compares the two."""

from __future__ import annotations

import ctypes
import enum
import struct
from collections.abc import Callable
from typing import Any

MAX_RANKS = 64
MAX_TOPK = 64
NO_ENTRY = 0xFFFFFFFF
POSITION_BITS = 20
FLAG_ROWS = 4
PASS_TOKENS = 4
HEADER_WORDS = 16
NUM_AGREED = 7
CONTROL_BYTES = 4096
"""Room for the struct `Control`, which only kernels look at."""


class HostWord(enum.IntEnum):
    """Words of the host's status page."""

    CODE = 0
    FIELD = 1
    RANK = 2
    THEIRS = 3
    OURS = 4
    READY = 5
    MISSING = 8


class Code(enum.IntEnum):
    """How an operation ended."""

    OK = 0
    TIMEOUT = 1
    DISAGREE = 2
    OVERFLOW = 3
    REFUSED = 4
    BAD_INDEX = 5


def _u64(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_uint64) for name in names]


def _u32(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_uint32) for name in names]


class Window(ctypes.Structure):
    """Where things are in the window."""

    _fields_ = [
        *_u64("peers", "host", "scratch", "timeout_ns", "header", "matrix", "counts", "ready", "done", "flags"),
        *_u64("credits", "finished", "metadata", "metadata_bytes", "payload", "payload_bytes"),
        *_u32("rank", "num_ranks", "max_local_experts", "num_flags", "num_passes", "ticket"),
    ]


class Cut(ctypes.Structure):
    """How a warp cuts rows for its shared-memory slots."""

    _fields_ = _u32(
        "row_bytes", "piece_bytes", "num_pieces", "slot_bytes", "slots_per_warp", "num_warps", "num_stage_warps", "pad"
    )


class DispatchArgs(ctypes.Structure):
    """Of `deepep_notify` and `deepep_dispatch_*`."""

    _fields_ = [
        ("window", Window),
        *_u64("x", "sf"),
        ("sf_stride_token", ctypes.c_int64),
        ("sf_stride_column", ctypes.c_int64),
        *_u64("topk_idx", "topk_weights", "is_token_in_rank", "tokens_per_expert", "dst_rank", "dst_row"),
        *_u64("rank_prefix_matrix", "psum_ranks", "counts_out", "psum_experts", "stats", "wait_stats"),
        *_u64("recv_x", "recv_sf", "recv_topk_idx", "recv_topk_weights", "recv_src_token", "expanded_row"),
        *_u64("rows_offset", "sf_offset"),
        ("header", ctypes.c_uint32 * NUM_AGREED),
        *_u32("num_tokens", "num_slots", "num_topk", "num_experts", "num_sf", "sf_format", "hidden"),
        *_u32("ring_rows", "sf_pitch", "is_in_window", "room", "num_rows", "num_compact_rows", "alignment"),
        *_u32(
            "do_zero_padding", "is_cached", "is_exact", "is_expanded", "num_early_chunks", "num_walkers", "num_counters"
        ),
        *_u32("metadata_rows", "sf_is_bulk", "recv_sf_is_bulk", "is_staging_shared", "is_in_place"),
        ("cut", Cut),
    ]


class CombineArgs(ctypes.Structure):
    """Of `deepep_combine_*`."""

    _fields_ = [
        ("window", Window),
        *_u64("x", "topk_weights", "out", "out_weights", "bias0", "bias1"),
        *_u64("topk_idx", "dst_rank", "dst_row", "psum_ranks", "recv_src_token", "expanded_row"),
        *_u64("rows_offset", "weights_offset", "wait_stats"),
        ("header", ctypes.c_uint32 * NUM_AGREED),
        *_u32("num_tokens", "num_slots", "num_topk", "num_local_experts"),
        *_u32("ring_rows", "weights_pitch", "is_in_window", "is_owner_only", "is_per_copy"),
        ("cut", Cut),
    ]


class BarrierArgs(ctypes.Structure):
    """Of `deepep_barrier`."""

    _fields_ = [
        ("window", Window),
        ("header", ctypes.c_uint32 * NUM_AGREED),
        *_u32("is_refusal", "is_close", "pad"),
    ]


def writer(first: Any, last: Any) -> Callable[..., None]:
    """Give what writes neighbouring members of 8 bytes at once: it takes a struct, the offset of the first, values.

    Member by member takes twice as long.
    """
    return struct.Struct(f"{(last.offset + last.size - first.offset) // 8}Q").pack_into


write_routing = writer(DispatchArgs.topk_idx, DispatchArgs.wait_stats)
"""From `topk_idx` to `wait_stats`."""
write_combine = writer(CombineArgs.x, CombineArgs.expanded_row)
"""From `x` to `expanded_row`."""
