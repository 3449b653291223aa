"""Who brings a dispatch's rows into the window, and where they lie there: decided on the host, so no GPU is needed."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from deepep import quant
from deepep.backends.base import BackendOptions, DispatchRequest, Layout, Routing
from deepep.cuda import dispatch_plan, kernels
from deepep.cuda.arguments import FLAG_ROWS, NO_ENTRY
from deepep.cuda.dispatch_plan import Plan
from deepep.cuda.engine import Engine
from deepep.cuda.window import map_window

T, H, K, E = 40, 1024, 4, 16
OFFSET = 4096


class FakeMemory:
    """A window that is the memory of a tensor on the CPU, as far as it goes."""

    def __init__(self, window: torch.Tensor) -> None:
        self.base = window.data_ptr()
        self.num_bytes = window.numel()

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        offset = tensor.data_ptr() - self.base
        return offset if 0 <= offset < self.num_bytes else None


def engine_of(num_ranks: int = 2, room: int | None = None, ranks_per_gpu: int = 1) -> tuple[Engine, torch.Tensor]:
    """What plans ask of an engine, and its window."""
    window_map = map_window(num_ranks, BackendOptions())
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    fake = SimpleNamespace(
        memory=FakeMemory(memory), window_map=window_map, window=window_map.struct, num_ranks=num_ranks,
        ranks_per_gpu=ranks_per_gpu, smem_bytes=200 << 10, plans={}, remember=lambda *_: None,
        ring_bytes=window_map.payload_bytes if room is None else room, num_sms=lambda wanted: wanted or 24,
        refusing=contextlib.nullcontext,
    )  # fmt: skip
    return cast(Engine, fake), memory


def request_of(x: torch.Tensor | None = None, **changes: Any) -> DispatchRequest:
    x = torch.zeros(T, H, dtype=torch.bfloat16) if x is None else x
    return DispatchRequest(x, changes.pop("sf", None), torch.zeros(T, K, dtype=torch.int64), None, E, **changes)


def known_routing() -> Routing:
    rows = torch.zeros(T, K, dtype=torch.int32)
    return Routing(
        Layout.EXPANDED, E, 0, 1, 60, 100, None, rows, rows, rows[:2, 0], torch.zeros(60).int(),
        torch.zeros(60, K).int(),
    )  # fmt: skip


def plan_of(request: DispatchRequest, **options: Any) -> Plan:
    return dispatch_plan.plan_of(engine_of(**options)[0], request)


def is_staged(plan: Plan) -> bool:
    """Whether kernels bring rows into the window."""
    return plan.args.num_early_chunks > 0 or plan.args.cut.num_stage_warps > 0


def fp8_rows(pitch: int = 8) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(T, H, dtype=quant.FP8_DTYPE), "sf": torch.zeros(T, pitch)[:, :8]}


def test_kernels_stage_while_the_cpu_waits_for_counts() -> None:
    plan = plan_of(request_of())
    assert plan.is_exact
    assert plan.copied == (0, 0)
    assert is_staged(plan)
    assert not plan.args.is_in_place
    assert plan.args.num_early_chunks == T // FLAG_ROWS
    assert plan.args.ring_rows == T


@pytest.mark.parametrize(
    "how", [{"num_worst_rows": 2 * T}, {"routing": known_routing(), "layout": Layout.EXPANDED}], ids=["worst", "cached"]
)
def test_the_copy_engine_brings_rows_where_no_cpu_waits(how: dict[str, Any]) -> None:
    plan = plan_of(request_of(**how))
    assert plan.copied == (T * H * 2, 0)
    assert not is_staged(plan)
    assert plan.args.is_in_place
    assert plan.args.ring_rows == NO_ENTRY


def test_scale_factors_lie_behind_the_rows() -> None:
    engine, _ = engine_of()
    plan = dispatch_plan.plan_of(engine, request_of(**fp8_rows(), num_worst_rows=2 * T))
    rows, sf = plan.copied
    assert (rows, sf) == (T * H, T * 8 * 4)
    start, args = engine.window_map.payload, plan.args
    assert start == args.rows_offset
    assert args.rows_offset + rows <= args.sf_offset
    assert args.sf_offset + sf <= start + engine.ring_bytes
    assert args.sf_offset % 16 == 0


@pytest.mark.parametrize(
    "how",
    [fp8_rows(pitch=12), {"sf_format": quant.SfFormat.FLOAT32}],
    ids=["scale factors with gaps", "rows that are cast"],
)
def test_kernels_stage_what_cannot_be_copied_in_one_piece(how: dict[str, Any]) -> None:
    plan = plan_of(request_of(**how, num_worst_rows=2 * T))
    assert plan.copied == (0, 0)
    assert is_staged(plan)
    assert not plan.args.is_in_place


@pytest.mark.parametrize(("ranks_per_gpu", "is_shared"), [(1, True), (2, False)])
def test_notify_stages_only_while_it_counts_where_ranks_are_alone(ranks_per_gpu: int, is_shared: bool) -> None:
    request = request_of(sf_format=quant.SfFormat.FLOAT32, num_worst_rows=2 * T)
    assert bool(plan_of(request, ranks_per_gpu=ranks_per_gpu).args.is_staging_shared) == is_shared


@pytest.mark.parametrize("worst", [None, 2 * T])
def test_rows_in_the_window_stay_there(worst: int | None) -> None:
    engine, memory = engine_of()
    x = memory[OFFSET : OFFSET + T * H * 2].view(torch.bfloat16).view(T, H)
    plan = dispatch_plan.plan_of(engine, request_of(x, num_worst_rows=worst))
    assert plan.copied == (0, 0)
    assert plan.args.is_in_place
    assert not is_staged(plan)
    assert plan.args.rows_offset == OFFSET


def test_a_rank_alone_publishes_nothing() -> None:
    for worst in (None, 2 * T):
        plan = plan_of(request_of(num_worst_rows=worst), num_ranks=1)
        assert plan.copied == (0, 0)
        assert not is_staged(plan)


def test_too_little_room_for_all_rows_makes_a_ring_of_whole_flags() -> None:
    plan = plan_of(request_of(num_worst_rows=2 * T), room=13 * H * 2)
    assert plan.copied == (0, 0)
    assert plan.args.ring_rows == 12
    assert plan.args.num_early_chunks == 12 // FLAG_ROWS
    assert plan.args.cut.num_stage_warps > 0, "the rest follows when others have read the first lap"
    assert plan.notify_smem >= kernels.pipe_bytes(plan.notify_cut)
