"""Windows of normal mode that hold a few rows only, ranks that do not come, and kernels that were broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from broken import compile_broken
from emulator import COMPILER, NORMAL, Build, EmulationError, Emulator
from normal_step import NormalStep
from normal_wanted import Way
from normal_world import NormalWorld

from deepep.backends.base import Layout, Reduction
from deepep.cuda.arguments import DispatchArgs
from deepep.errors import CommTimeout
from deepep.testing.routing import Case

pytest_plugins = ("normal_fixtures",)
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs Linux and a C++ compiler"),
    pytest.mark.usefixtures("poisoned_memory"),
]

_RING = 8  # the fewest rows that combine takes


def _case(num_tokens: tuple[int, ...]) -> Case:
    return Case(num_tokens, 64, num_experts=2 * len(num_tokens), num_topk=2)


def _dispatch(world: NormalWorld, case: Case, layout: Layout) -> None:
    step = NormalStep(world, case, Way(layout))
    for _ in range(2):
        step.dispatch()
        world.run(seed=0)
    step.check()


@pytest.mark.parametrize("num_tokens", [(40, 20), (40, 4), (16, 4), (4, 40), (40, 0), (9, 60, 33)])
@pytest.mark.parametrize("layout", [Layout.COMPACT, Layout.EXPANDED])
def test_dispatch_in_laps(
    monkeypatch: pytest.MonkeyPatch, normal_emulator: Emulator, layout: Layout, num_tokens: tuple[int, ...]
) -> None:
    case = _case(num_tokens)
    _dispatch(NormalWorld(monkeypatch, normal_emulator, case, room=_RING * 2 * case.hidden), case, layout)


@pytest.mark.parametrize(
    "way",
    [
        Way(has_weights=True),
        Way(Layout.EXPANDED, is_exact=False),
        Way(Layout.EXPANDED, reduction=Reduction.PER_COPY, has_weights=True),
    ],
    ids=["compact", "expanded", "per copy"],
)
@pytest.mark.parametrize("num_tokens", [(40, 20), (16, 4), (9, 60, 0)])
def test_combine_in_laps(
    monkeypatch: pytest.MonkeyPatch, normal_emulator: Emulator, num_tokens: tuple[int, ...], way: Way
) -> None:
    case = replace(_case(num_tokens), pattern="holes")
    copies = case.num_topk if way.reduction is Reduction.PER_COPY else 1
    row_bytes = 2 * case.hidden * copies + 16 * way.has_weights
    world = NormalWorld(monkeypatch, normal_emulator, case, room=_RING * case.num_ranks * row_bytes)
    NormalStep(world, case, way).run(seed=0)


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_rank_that_does_not_come_is_named(
    monkeypatch: pytest.MonkeyPatch, normal_emulator: Emulator, is_exact: bool
) -> None:
    case = _case((5, 7, 3))
    world = NormalWorld(monkeypatch, normal_emulator, case, timeout=2e-4)
    world.engines.pop()
    step = NormalStep(world, case, Way(is_exact=is_exact))
    with pytest.raises(CommTimeout, match=r"rank\(s\) 2 did not"):
        _launch_and_run(step)


def _launch_and_run(step: NormalStep) -> None:
    step.dispatch()
    step.world.run(seed=0)


_TOKENS = "max_of(theirs[kHeaderTokens], 1u)"


@pytest.mark.parametrize(
    ("line", "instead", "is_hopper"),
    [
        # Laps of its own rows are none of a rank's business: then it waits for itself.
        (f"{_TOKENS}, theirs[kHeaderRing]", f"{_TOKENS}, source.ring", False),
        ("op.wait(op.credit_of(peer, lap - 1), op.epoch, 0, peer);", "", True),
        ("if (lane_index() == 0) op.wait(flag_for(source, slot)", "if (false) op.wait(flag_for(source, slot)", False),
        ("first_row[receiver] = base;", "first_row[receiver] = 0;", False),
        ("if (lane_index() == 0) bulk_wait_done();", "", True),  # rows are published before they are stored
    ],
)
def test_broken_kernels_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, instead: str, is_hopper: bool
) -> None:
    build: Build = {spec: args for spec, args in NORMAL.items() if args is DispatchArgs}
    emulator = compile_broken(monkeypatch, line, instead, lambda: Emulator(tmp_path, build, is_hopper))
    case = _case((40, 20))
    world = NormalWorld(monkeypatch, emulator, case, room=_RING * 2 * case.hidden, timeout=1e-3)
    with pytest.raises((AssertionError, CommTimeout, EmulationError)):
        _dispatch(world, case, Layout.COMPACT)
