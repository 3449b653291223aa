"""The kernels of normal mode on a CPU: over odd shapes and random orders of threads, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulator import COMPILER, Emulator
from normal_step import NormalStep
from normal_wanted import Way
from normal_world import NormalWorld

from deepep.backends.base import Layout, Reduction
from deepep.quant import SfFormat
from deepep.testing.routing import Case

pytest_plugins = ("normal_fixtures",)
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs Linux and a C++ compiler"),
    pytest.mark.usefixtures("poisoned_memory"),
]

_WAYS = {
    "compact": Way(num_biases=1),
    "compact, no counts": Way(is_exact=False, has_weights=True),
    "compact, ranks": Way(has_topk=False, num_biases=2),
    "expanded": Way(Layout.EXPANDED, has_weights=True, num_biases=2),
    "expanded, no counts": Way(Layout.EXPANDED, is_exact=False, is_zeroed=True),
    "expanded, per copy": Way(Layout.EXPANDED, is_exact=False, reduction=Reduction.PER_COPY, has_weights=True),
}


@pytest.mark.parametrize("way", _WAYS.values(), ids=_WAYS)
@pytest.mark.parametrize(
    ("case", "num_sms"),
    [
        (Case((5,), 72, num_experts=3, num_topk=2), 2),
        (Case((9, 6), 136, num_experts=4, num_topk=3, pattern="holes", expert_alignment=4), 1),
        (Case((7, 11), 8, num_experts=80, num_topk=40, pattern="holes"), 3),
        (Case((13, 0), 8200, num_experts=6, num_topk=1), 2),  # rows in pieces, more than there are slots
        (Case((0, 0), 64), 2),
        (Case((6, 3, 8), 264, num_experts=6, num_topk=4, pattern="none"), 2),
        (Case((6, 0, 30), 40, num_experts=6, num_topk=2, pattern="one_expert", expert_alignment=8), 2),
        (Case((33, 2, 17), 64, num_experts=9, num_topk=3, pattern="spread", num_max_tokens_per_rank=50), 3),
    ],
    ids=lambda value: f"{value.num_tokens}" if isinstance(value, Case) else None,
)
def test_dispatch_and_combine(
    monkeypatch: pytest.MonkeyPatch, normal_emulator: Emulator, case: Case, num_sms: int, way: Way
) -> None:
    world = NormalWorld(monkeypatch, normal_emulator, case, num_sms)
    NormalStep(world, case, way).run(seed=num_sms)


@pytest.mark.parametrize("layout", [Layout.COMPACT, Layout.EXPANDED])
@pytest.mark.parametrize("sf_format", SfFormat)
def test_rows_are_cast_on_the_way(
    monkeypatch: pytest.MonkeyPatch, normal_emulator: Emulator, sf_format: SfFormat, layout: Layout
) -> None:
    case = Case((9, 21), 3 * sf_format.hidden_multiple, num_experts=4, num_topk=2)
    world = NormalWorld(monkeypatch, normal_emulator, case, room=16 * 2 * case.hidden)  # several laps
    for is_exact in (True, False):
        NormalStep(world, case, Way(layout, is_exact, sf_format=sf_format)).run(seed=0)


@pytest.mark.parametrize(("num_sf", "is_column_major"), [(4, False), (3, False), (4, True)])
@pytest.mark.parametrize("layout", [Layout.COMPACT, Layout.EXPANDED])
def test_scale_factors_travel_beside_rows(
    monkeypatch: pytest.MonkeyPatch, normal_emulator: Emulator, num_sf: int, is_column_major: bool, layout: Layout
) -> None:
    case = Case((9, 21), 128, num_experts=4, num_topk=2, num_sf=num_sf, sf_column_major=is_column_major)
    for room in (16 * 2 * case.hidden, 0):
        world = NormalWorld(monkeypatch, normal_emulator, case, room=room)
        for is_exact in (True, False):
            NormalStep(world, case, Way(layout, is_exact)).run(seed=0)


@pytest.mark.parametrize("layout", [Layout.COMPACT, Layout.EXPANDED])
def test_rows_of_float32(monkeypatch: pytest.MonkeyPatch, normal_emulator: Emulator, layout: Layout) -> None:
    case = Case((9, 21), 140, num_experts=4, num_topk=2, dtype=torch.float32)
    NormalStep(NormalWorld(monkeypatch, normal_emulator, case), case, Way(layout)).run(seed=0)


@pytest.mark.parametrize("name", ["compact, no counts", "expanded, no counts"])
def test_ranks_may_be_calls_ahead(monkeypatch: pytest.MonkeyPatch, normal_emulator: Emulator, name: str) -> None:
    largest = Case((21, 30, 5), 72, num_experts=6, num_topk=3, pattern="holes", num_max_tokens_per_rank=30)
    world = NormalWorld(monkeypatch, normal_emulator, largest)
    numbers = [(21, 30, 5), (0, 0, 0), (1, 0, 30), (0, 9, 3)]
    cases = [replace(largest, num_tokens=one, seed=seed) for seed, one in enumerate(numbers)]
    steps = [NormalStep(world, case, _WAYS[name]) for case in cases]
    for step in steps:
        step.dispatch()
        step.dispatch()
        step.combine()
    world.run(seed=1)
    for step in steps:
        step.check()
