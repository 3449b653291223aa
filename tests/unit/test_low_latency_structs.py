"""The structs of `ll_layout.cuh` agree with their twins in Python, and the window is divided without overlap."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest

import deepep
from deepep.cuda import ll_grid, ll_structs
from deepep.cuda.ll_structs import Shape, divide
from deepep.cuda.sources import source_root

_TYPES = {"uint64_t": ctypes.c_uint64, "uint32_t": ctypes.c_uint32}
_HEADER = (source_root() / "include" / "deepep" / "ll_layout.cuh").read_text()


def members_in_header(name: str) -> list[tuple[str, object]]:
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", _HEADER, re.DOTALL)
    assert body is not None
    found: list[tuple[str, object]] = []
    for line in filter(None, (part.strip() for part in re.sub(r"//[^\n]*", "", body.group(1)).split(";"))):
        kind, names = line.split(None, 1)
        found += [(item.strip(), _TYPES.get(kind) or getattr(ll_structs, kind)) for item in names.split(",")]
    return found


@pytest.mark.parametrize("name", ["LlWindow", "LlShape", "LlCommon", "LlDispatchArgs", "LlCombineArgs", "LlCleanArgs"])
def test_members_agree(name: str) -> None:
    assert members_in_header(name) == [(field[0], field[1]) for field in getattr(ll_structs, name)._fields_]


@pytest.mark.parametrize(
    ("args", "write", "last"),
    [
        (ll_structs.LlDispatchArgs, ll_structs.write_dispatch_call, "recv_stats"),
        (ll_structs.LlCombineArgs, ll_structs.write_combine_call, "combine_epoch"),
    ],
)
def test_a_call_writes_all_its_pointers_and_nothing_else(args: Any, write: Any, last: str) -> None:
    names = [field[0] for field in args._fields_[1:]]
    own = names[: names.index(last) + 1]
    shared = ["wait_stats", "call_epoch", "sources", "home_topk", "routes", "route_weights"]
    struct = args()
    write(struct, ll_structs.CALL_OFFSET, *range(1, len(shared + own) + 1))
    assert [getattr(struct.common, name) for name in shared] + [getattr(struct, name) for name in own] == [
        *range(1, len(shared + own) + 1)
    ]
    assert struct.common.is_shrinkable == 0
    assert not any(getattr(struct, name) for name in names[len(own) :])


def test_the_mask_is_where_kernels_keep_it() -> None:
    body = re.search(r"struct LlState \{(.*?)uint32_t mask\[kLlMaxRanks\];\s+uint32_t is_stale\[", _HEADER, re.DOTALL)
    assert body is not None
    assert re.findall(r"(uint\d\d)_t (\w+)((?:\[\w+\])+)", body.group(1)) == [
        ("uint64", "starts", "[2]"),
        ("uint32", "read_epoch", "[2][2]"),
        ("uint32", "num_readers", "[2][2]"),
        ("uint32", "num_read", "[2][2]"),
        ("uint32", "num_drawn", "[kLlDrawings]"),
    ]
    assert ll_structs.LlState.mask.offset == 2 * 8 + 3 * 4 * 4 + 4 * 4
    assert ll_structs.LlState.is_stale.offset == ll_structs.LlState.mask.offset + 4 * ll_structs.MAX_RANKS


@pytest.mark.parametrize(("constant", "value"), [("kLlMaxRanks", 64), ("kLlMaxTopk", 64)])
def test_limits_agree(constant: str, value: int) -> None:
    found = re.search(rf"\b{constant} = (\d+)", _HEADER)
    assert found is not None
    assert int(found.group(1)) == value == ll_structs.MAX_RANKS == ll_structs.MAX_TOPK


@pytest.mark.parametrize(
    ("header", "constant", "value"),
    [
        ("ll_workers.cuh", "kVecsAtOnce", ll_grid.VECS_PER_WORKER),
        ("types.cuh", "kWarpSize", ll_grid.LISTING_THREADS),
    ],
)
def test_grids_are_chosen_for_what_workers_load_at_once(header: str, constant: str, value: int) -> None:
    found = re.search(rf"\b{constant} = (\d+)", (source_root() / "include" / "deepep" / header).read_text())
    assert found is not None
    assert int(found.group(1)) == value


@pytest.mark.parametrize("divisor", [*range(1, 65), 100, 1000, 4097, (1 << 16) - 1])
def test_multiplication_divides(divisor: int) -> None:
    end = (1 << 32) // divisor
    magic, last = ll_structs.magic(divisor), (end - 1) // divisor
    assert magic < 1 << 32
    for quotient in {*range(min(last, 50)), *range(max(last - 50, 0), last + 1)}:
        for n in (quotient * divisor, min(quotient * divisor + divisor - 1, end - 1)):
            assert (n if magic == 0 else n * magic >> 32) == n // divisor


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 4, 1, 1, 8),
        Shape(2, 256, 8, 128, 7168),
        Shape(3, 9, 64, 5, 2880),
        Shape(8, 64, 8, 17, 128, per_copy=True),
        Shape(2, 8, 8, 17, 128, per_copy=True),
    ],
)
def test_arrays_follow_each_other_without_overlap(shape: Shape) -> None:
    division, ranks, tokens = divide(shape), shape.num_ranks, shape.num_max_tokens
    sizes = {
        "headers": 8 * ranks,
        "counts": 8 * shape.num_experts,
        "absent": 8 * ranks * tokens,
        "dispatch_credits": 8 * ranks,
        "weights": 8 * ranks * tokens * shape.num_topk,
        "combine_credits": 8 * ranks,
        "dispatch_slots": ranks * tokens * shape.slot_bytes,
        "combine_slots": tokens * shape.num_slots * 2 * shape.hidden,
    }
    end = division.banks_offset
    for name, size in sizes.items():
        start = getattr(division.window, name)
        assert start >= end
        assert start % 128 == 0
        end = start + size
    assert division.banks_offset + division.window.bank_stride >= end
    assert division.num_bytes == division.banks_offset + ll_structs.NUM_BANKS * division.window.bank_stride
    assert shape.choice_offset >= 2 * shape.hidden >= shape.hidden + 4 * shape.hidden // 128, "rows of either kind fit"
    assert shape.slot_bytes >= shape.choice_offset + 16 * shape.num_topk


hint = deepep.Buffer.get_low_latency_rdma_size_hint


@pytest.mark.parametrize("num_topk", [1, 8, ll_structs.MAX_TOPK])
@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "num_max_tokens", "hidden"),
    [(1, 1, 1, 8), (2, 256, 128, 7168), (3, 9, 5, 2880), (8, 288, 128, 7168), (8, 64, 33, 136), (64, 8192, 16, 512)],
)
def test_the_size_hint_covers_what_a_window_needs(
    num_ranks: int, num_experts: int, num_max_tokens: int, hidden: int, num_topk: int
) -> None:
    needed = divide(Shape(num_ranks, num_experts, num_topk, num_max_tokens, hidden)).num_bytes
    hinted = hint(num_max_tokens, hidden, num_ranks, num_experts)
    assert needed <= hinted
    if num_topk == ll_structs.MAX_TOPK:
        assert hinted - needed <= 2 * 8 * 128, "no more than gaps between arrays"


def test_a_large_decode_window_is_under_100_mb() -> None:
    assert divide(Shape(8, 288, 8, 128, 7168)).num_bytes < hint(128, 7168, 8, 288) < 100e6
