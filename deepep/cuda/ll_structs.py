"""Arguments of the low-latency kernels: mirrors of csrc/include/deepep/ll_layout.cuh, and how the window is divided."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

from deepep.cuda.arguments import writer
from deepep.cuda.jit import KernelSpec
from deepep.errors import InvalidArgument
from deepep.layout import align

MAX_RANKS = 64
MAX_TOPK = 64
NUM_BANKS = 2
NUM_THREADS = 512
SEND, RECV = 1, 2
BAD_INDEX, NOT_CLEANED = 4, 5

SPARE_BYTES = 1 << 20
_STATE_BYTES = 4096
_CHOICE_BYTES = 16
_SLOT_ALIGNMENT = 128
_MOST_NUMBERS = 1 << 32  # of vectors of expert outputs


class Kernels(NamedTuple):
    """What low latency launches."""

    dispatch: KernelSpec
    combine: KernelSpec
    clean: KernelSpec


def _kernels(is_wide: bool) -> Kernels:
    defines = (("DEEPEP_LL_WIDE", int(is_wide)),)
    return Kernels(*(KernelSpec(f"ll_{op}_kernel", f"kernels/ll_{op}.cu", defines) for op in Kernels._fields))


NARROW, WIDE = _kernels(False), _kernels(True)
"""For up to 32 ranks and top-k of up to 32, and for more of either."""


def _fields(types: dict[str, type]) -> list[tuple[str, type]]:
    return [(name, kind) for names, kind in types.items() for name in names.split()]


class LlState(ctypes.Structure):
    """What a rank keeps at the start of its window, up to what the host looks at."""

    _fields_ = [
        *_fields({"starts": ctypes.c_uint64 * 2, "read_epoch num_readers num_read num_drawn": ctypes.c_uint32 * 4}),
        *_fields({"mask is_stale": ctypes.c_uint32 * MAX_RANKS}),
    ]


class LlWindow(ctypes.Structure):
    """Offsets of bank 0 inside every rank's window."""

    _fields_ = _fields(
        {
            "state headers counts absent dispatch_credits weights combine_credits": ctypes.c_uint64,
            "dispatch_slots combine_slots bank_stride": ctypes.c_uint64,
        }
    )


class LlShape(ctypes.Structure):
    """Sizes that all ranks agree on, and this rank's number."""

    _fields_ = _fields(
        {
            "rank num_ranks num_experts num_local_experts num_topk hidden": ctypes.c_uint32,
            "num_max_tokens num_slots slot_bytes choice_offset": ctypes.c_uint32,
            "local_experts_magic ranks_magic others_magic": ctypes.c_uint32,
        }
    )


class LlCommon(ctypes.Structure):
    """What all low-latency kernels take."""

    _fields_ = [
        *_fields({"peer_table own_base status timeout_ns": ctypes.c_uint64}),
        ("window", LlWindow),
        ("shape", LlShape),
        *_fields({"phases num_tokens team_threads is_shrinkable": ctypes.c_uint32}),
        *_fields({"wait_stats call_epoch sources home_topk routes route_weights": ctypes.c_uint64}),
    ]


class LlDispatchArgs(ctypes.Structure):
    """Arguments of `ll_dispatch_kernel`."""

    _fields_ = [
        ("common", LlCommon),
        *_fields(
            {
                "x topk_idx topk_weights recv_x recv_sf recv_count src_info layout_range recv_stats": ctypes.c_uint64,
                "sf_format tokens_per_block keeps_own recv_parts send_parts pad": ctypes.c_uint32,
            }
        ),
    ]


class LlCombineArgs(ctypes.Structure):
    """Arguments of `ll_combine_kernel`."""

    _fields_ = [
        ("common", LlCommon),
        *_fields(
            {
                "x topk_idx topk_weights out combine_epoch": ctypes.c_uint64,
                "is_per_copy use_logfmt has_sent_weights keeps_own": ctypes.c_uint32,
                "has_workers debt_parts home_parts debt_parts_magic home_parts_magic pad": ctypes.c_uint32,
            }
        ),
    ]


CALL_OFFSET = LlCommon.wait_stats.offset
"""From here on lie the pointers of a call, those that all kernels take and then those of one; see the two below."""

write_dispatch_call = writer(LlCommon.wait_stats, LlDispatchArgs.recv_stats)
"""Write them at once, from `wait_stats` to `recv_stats`."""

write_combine_call = writer(LlCommon.wait_stats, LlCombineArgs.combine_epoch)
"""The same from `wait_stats` to `combine_epoch`."""


class LlCleanArgs(ctypes.Structure):
    """Arguments of `ll_clean_kernel`."""

    _fields_ = [("common", LlCommon), *_fields({"is_barrier resets": ctypes.c_uint32})]


def magic(divisor: int) -> int:
    """Give what kernels multiply by instead of dividing; see `divide` in ll_common.cuh."""
    return -(-(1 << 32) // divisor) if divisor > 1 else 0


@dataclass(frozen=True)
class Shape:
    """What the division of the window depends on; equal on all ranks.

    Attributes:
        num_ranks: R.
        num_experts: E.
        num_topk: K.
        num_max_tokens: M.
        hidden: H, channels of bf16.
        per_copy: room for a row per choice of a token, not only per rank.
    """

    num_ranks: int
    num_experts: int
    num_topk: int
    num_max_tokens: int
    hidden: int
    per_copy: bool = False

    @property
    def num_local_experts(self) -> int:
        """L."""
        return self.num_experts // self.num_ranks

    @property
    def kernels(self) -> Kernels:
        """What can be launched for this shape."""
        return WIDE if max(self.num_ranks, self.num_topk) > 32 else NARROW

    @property
    def num_slots(self) -> int:
        """Rows that a token of this rank has room for in combine."""
        return max(self.num_ranks, self.num_topk) if self.per_copy else self.num_ranks

    @property
    def choice_offset(self) -> int:
        """Byte of a dispatch slot where the choices start; a bf16 row is larger than an FP8 one with its scales."""
        return align(2 * self.hidden, _CHOICE_BYTES)

    @property
    def slot_bytes(self) -> int:
        """Size of a dispatch slot."""
        return align(self.choice_offset + _CHOICE_BYTES * self.num_topk, _SLOT_ALIGNMENT)


@dataclass(frozen=True)
class Division:
    """Where everything lies in the window.

    Attributes:
        window: offsets for the kernels.
        banks_offset: first byte of bank 0; all that follows begins as zeros.
        num_bytes: size of it all.
    """

    window: LlWindow
    banks_offset: int
    num_bytes: int


def divide(shape: Shape) -> Division:
    """Divide the window: state, then per bank words and slots, each array at a multiple of 128 bytes.

    Raises:
        InvalidArgument: rows of all experts are more than kernels can number.
    """
    ranks, tokens = shape.num_ranks, shape.num_max_tokens
    num_rows = shape.num_local_experts * ranks * tokens
    if num_rows * (shape.hidden // 8) > _MOST_NUMBERS or num_rows > _MOST_NUMBERS // 2:
        raise InvalidArgument(
            f"low_latency: {shape.num_local_experts} experts with room for {ranks} x {tokens} rows of {shape.hidden} "
            f"channels are {16 * num_rows * (shape.hidden // 8)} bytes of bf16; backend 'ipc' takes at most "
            f"{16 * _MOST_NUMBERS} bytes and {_MOST_NUMBERS // 2} rows"
        )
    words = {
        "headers": ranks,
        "counts": shape.num_experts,
        "absent": ranks * tokens,
        "dispatch_credits": ranks,
        "weights": ranks * tokens * shape.num_topk,
        "combine_credits": ranks,
    }
    sizes = {name: 8 * count for name, count in words.items()}
    sizes["dispatch_slots"] = ranks * tokens * shape.slot_bytes
    sizes["combine_slots"] = tokens * shape.num_slots * 2 * shape.hidden
    window = LlWindow(state=0)
    at = _STATE_BYTES
    for name, size in sizes.items():
        setattr(window, name, at)
        at += align(size, _SLOT_ALIGNMENT)
    window.bank_stride = at - _STATE_BYTES
    return Division(window, _STATE_BYTES, _STATE_BYTES + NUM_BANKS * window.bank_stride)
