"""The structs of `layout.cuh` and their twins in Python name the same members in the same order, of the same types."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest

from deepep.cuda import arguments, layout
from deepep.cuda.sources import source_root

_TYPES = {"uint64_t": ctypes.c_uint64, "int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32}
_HEADER = (source_root() / "include" / "deepep" / "layout.cuh").read_text()


def members_in(source: str, name: str) -> list[tuple[str, object]]:
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", source, re.DOTALL)
    assert body is not None
    text = re.sub(r"//[^\n]*", "", body.group(1))
    found: list[tuple[str, object]] = []
    for line in filter(None, (part.strip() for part in text.split(";"))):
        kind, names = line.split(None, 1)
        for member in (item.strip() for item in names.split(",")):
            array = re.fullmatch(r"(\w+)\[kNumAgreed\]", member)
            if array is not None:
                found.append((array.group(1), ctypes.c_uint32 * arguments.NUM_AGREED))
            else:
                found.append((member, _TYPES.get(kind) or getattr(arguments, kind)))
    return found


@pytest.mark.parametrize("name", ["Window", "Cut", "DispatchArgs", "CombineArgs", "BarrierArgs"])
def test_members_agree(name: str) -> None:
    assert members_in(_HEADER, name) == [(field[0], field[1]) for field in getattr(arguments, name)._fields_]


def test_members_of_layout_agree() -> None:
    source = (source_root() / "kernels" / "layout.cu").read_text()
    assert members_in(source, "LayoutArgs") == [(field[0], field[1]) for field in layout.LayoutArgs._fields_]
    assert f"kTileTokens = {layout._TILE_TOKENS};" in source


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        ("kMaxRanks", arguments.MAX_RANKS),
        ("kMaxTopk", arguments.MAX_TOPK),
        ("kPositionBits", arguments.POSITION_BITS),
        ("kFlagRows", arguments.FLAG_ROWS),
        ("kPassTokens", arguments.PASS_TOKENS),
        ("kHeaderWords", arguments.HEADER_WORDS),
        *((f"kHost{word.name.title()}", word.value) for word in arguments.HostWord),
        *(("k" + code.name.title().replace("_", ""), code.value) for code in arguments.Code),
    ],
)
def test_constants_agree(constant: str, value: int) -> None:
    found = re.search(rf"\b{constant} = (\d+)", _HEADER)
    assert found is not None
    assert int(found.group(1)) == value


def test_kernel_parameters_fit_the_limit() -> None:
    assert ctypes.sizeof(arguments.DispatchArgs) <= 4096
    assert ctypes.sizeof(arguments.CombineArgs) <= 4096


@pytest.mark.parametrize(
    ("args", "write", "first", "last"),
    [
        (arguments.DispatchArgs, arguments.write_routing, "topk_idx", "wait_stats"),
        (arguments.CombineArgs, arguments.write_combine, "x", "expanded_row"),
    ],
)
def test_pointers_are_written_side_by_side_and_nothing_else_is(args: Any, write: Any, first: str, last: str) -> None:
    names = [field[0] for field in args._fields_]
    written = names[names.index(first) : names.index(last) + 1]
    struct = args()
    write(struct, getattr(args, first).offset, *range(1, len(written) + 1))
    assert [getattr(struct, name) for name in written] == [*range(1, len(written) + 1)]
    assert bytes(struct).count(0) == ctypes.sizeof(args) - len(written)
