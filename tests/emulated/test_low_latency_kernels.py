"""The low-latency kernels themselves, on a CPU: over odd shapes and random orders of threads, against plain loops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from emulator import COMPILER, LOW_LATENCY_WIDE, Emulator
from world import Step, World

from deepep.backends.base import CombineResult, DispatchResult, Reduction
from deepep.cuda.ll_structs import Shape
from deepep.quant import SfFormat

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs Linux and a C++ compiler")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"), is_hopper=True)


@pytest.mark.parametrize(
    ("num_ranks", "num_sms", "num_tokens", "hidden"),
    [
        (1, 3, [5], 128),  # more rows than blocks: those that stay skip the window
        (1, 8, [3], 2176),
        (2, 2, [9, 7], 256),
        (2, 2, [9, 7], 2176),  # teams draw halves of rows to add up
        (2, 5, [9, 0], 384),
        (2, 12, [2, 3], 2176),  # several blocks to a row
        (2, 32, [1, 4], 4096),
        (3, 4, [6, 1, 8], 128),
        (3, 13, [0, 2, 1], 2304),
    ],
)
def test_dispatch_and_combine(
    monkeypatch: pytest.MonkeyPatch,
    emulator: Emulator,
    num_ranks: int,
    num_sms: int,
    num_tokens: list[int],
    hidden: int,
) -> None:
    world = World(monkeypatch, emulator, Shape(num_ranks, 4 * num_ranks, 3, max(num_tokens), hidden), num_sms)
    ranks = range(num_ranks)
    formats = itertools.cycle((None, SfFormat.FLOAT32, SfFormat.POW2))
    for seed, sf_format in zip(range(4), formats, strict=False):
        step = Step(world, num_tokens, seed)
        dispatched = [step.dispatch(rank, sf_format, weights_ahead=seed % 2 == 1) for rank in ranks]
        combined = [step.combine(rank, dispatched[rank]) for rank in ranks]
        emulator.run(seed)
        for rank in ranks:
            step.check_dispatch(rank, dispatched[rank], sf_format)
            assert torch.equal(combined[rank].x, step.expected_combine(rank)), f"seed {seed}, rank {rank}"
    assert not world.status.any()


@pytest.mark.parametrize(("num_ranks", "num_topk"), [(2, 40), (33, 2)])
def test_more_than_32_ranks_or_choices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_ranks: int, num_topk: int
) -> None:
    shape = Shape(num_ranks, 66, num_topk, 3, 128)
    world = World(monkeypatch, Emulator(tmp_path, LOW_LATENCY_WIDE), shape, num_sms=2)
    for seed in range(2):
        step = Step(world, [seed + rank % 3 for rank in range(num_ranks)], seed)
        dispatched = [step.dispatch(rank) for rank in range(num_ranks)]
        combined = [step.combine(rank, dispatched[rank]) for rank in range(num_ranks)]
        world.emulator.run(seed)
        for rank in range(num_ranks):
            step.check_dispatch(rank, dispatched[rank])
            assert torch.equal(combined[rank].x, step.expected_combine(rank)), f"seed {seed}, rank {rank}"


@pytest.mark.parametrize("sf_format", [None, SfFormat.UE8M0])
@pytest.mark.parametrize("reduction", Reduction)
def test_two_phases_and_both_reductions(
    monkeypatch: pytest.MonkeyPatch, emulator: Emulator, reduction: Reduction, sf_format: SfFormat | None
) -> None:
    shape = Shape(2, 8, 3, 6, 512, per_copy=reduction is Reduction.PER_COPY)
    world = World(monkeypatch, emulator, shape, num_sms=3)
    for seed in range(3):
        step = Step(world, [6, 4], seed)
        dispatched = [step.dispatch(rank, sf_format, split=True) for rank in range(2)]
        _finish(world, dispatched)
        logfmt = seed == 2
        combined = [step.combine(rank, dispatched[rank], reduction, split=True, use_logfmt=logfmt) for rank in range(2)]
        _finish(world, combined)
        emulator.run(seed)
        for rank in range(2):
            step.check_dispatch(rank, dispatched[rank], sf_format)
            wanted = step.expected_combine(rank, reduction, use_logfmt=logfmt)
            assert torch.equal(combined[rank].x, wanted), f"seed {seed}, rank {rank}"


@pytest.mark.parametrize("num_tokens", [[2, 2, 2], [9, 9, 9]])
def test_waits_are_noted(monkeypatch: pytest.MonkeyPatch, emulator: Emulator, num_tokens: list[int]) -> None:
    world = World(monkeypatch, emulator, Shape(3, 6, 3, 9, 256), num_sms=3)
    step = Step(world, num_tokens, 0, pattern="spread")
    waited = [torch.zeros(3, dtype=torch.int64) for _ in range(3)]
    dispatched = [step.dispatch(rank, wait_stats=waited[rank]) for rank in range(3)]
    emulator.run(0, ns_per_round=2_000)
    for rank in range(3):
        step.check_dispatch(rank, dispatched[rank])
        assert all(int(waited[rank][other]) > 0 for other in range(3) if other != rank)
        waited[rank].zero_()
    combined = [step.combine(rank, dispatched[rank], wait_stats=waited[rank]) for rank in range(3)]
    emulator.run(0, ns_per_round=2_000)
    for rank in range(3):
        assert torch.equal(combined[rank].x, step.expected_combine(rank))
        assert [int(us) > 0 for us in waited[rank]] == [other != rank for other in range(3)]


def test_few_and_many_tokens_take_turns(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    world = World(monkeypatch, emulator, Shape(2, 4, 2, 16, 256), num_sms=9)
    steps, dispatched, combined = [], [], []
    for seed, num_tokens in enumerate(([1, 16], [16, 2], [0, 0], [3, 0], [16, 16], [2, 1])):
        steps.append(Step(world, num_tokens, seed))
        dispatched.append([steps[-1].dispatch(rank) for rank in range(2)])
        combined.append([steps[-1].combine(rank, dispatched[-1][rank]) for rank in range(2)])
    emulator.run(1)  # all of it: a rank may be calls ahead, as far as credits let it
    for step, received, sums in zip(steps, dispatched, combined, strict=True):
        for rank in range(2):
            step.check_dispatch(rank, received[rank])
            assert torch.equal(sums[rank].x, step.expected_combine(rank))


@pytest.mark.parametrize("timeout", [1e-3, 1.1e-3, 4e-3])
@pytest.mark.parametrize("num_tokens", [[2, 3, 1], [9, 8, 9]], ids=["few_beside_many", "many"])
@pytest.mark.parametrize("leaves_before", ["dispatch", "combine"])
def test_survivors_mask_the_rank_that_leaves(
    monkeypatch: pytest.MonkeyPatch, emulator: Emulator, leaves_before: str, num_tokens: list[int], timeout: float
) -> None:
    gone, survivors = 2, (0, 1)
    shape = Shape(3, 6, 3, 12, 256)
    world = World(monkeypatch, emulator, shape, num_sms=6, timeout=timeout, is_shrinkable=True)
    for seed in range(5):
        step = Step(world, num_tokens, seed, pattern="spread")  # all wait for all
        has_left = seed > 1 or (seed == 1 and leaves_before == "dispatch")
        dispatched: dict[int, DispatchResult] = {}
        for rank in survivors if has_left else range(3):
            dispatched[rank] = step.dispatch(rank)
        combined = {rank: step.combine(rank, dispatched[rank]) for rank in (range(3) if seed == 0 else survivors)}
        emulator.run(seed, ns_per_round=2_000)
        masks = [world.mask(rank).tolist() for rank in survivors]
        assert masks == [[0, 0, int(seed > 0)]] * 2, f"seed {seed}"
        if seed == 1:
            continue  # a call that loses a rank may miss of it what it will
        for rank in survivors:
            away = (gone,) if seed > 0 else ()
            step.check_dispatch(rank, dispatched[rank], gone=away)
            assert torch.equal(combined[rank].x, step.expected_combine(rank, gone=away)), f"seed {seed}, rank {rank}"
    assert not world.status.any()


def test_a_lost_rank_is_told_to_the_host(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    world = World(monkeypatch, emulator, Shape(2, 4, 2, 4, 128), num_sms=4, timeout=1e-3)
    step = Step(world, [3, 3], 0)
    alone = step.dispatch(0)
    emulator.run(0, ns_per_round=2_000)
    assert world.status.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    del alone  # what kernels write to has to live until then


@pytest.mark.parametrize("seed", range(4))
def test_a_rank_that_cleaned_alone_is_no_answer_to_others(
    monkeypatch: pytest.MonkeyPatch, emulator: Emulator, seed: int
) -> None:
    world = World(monkeypatch, emulator, Shape(3, 3, 1, 2, 128), num_sms=2, timeout=1e-3, is_shrinkable=True)
    world.on(2).meet()
    emulator.run(seed, ns_per_round=2_000)
    assert world.mask(2).tolist() == [1, 1, 0]
    world.mask(2).zero_()
    world.on(0).meet()
    world.on(1).meet()
    emulator.run(seed, ns_per_round=2_000)
    for rank in (0, 1):  # which waited for it in vain
        assert world.mask(rank).tolist() == [0, 0, 1]
        world.mask(rank).zero_()
    for _ in range(3):
        for rank in range(3):
            world.on(rank).meet()
        emulator.run(seed)
        assert [world.mask(rank).tolist() for rank in range(3)] == [[0, 0, 0]] * 3


def _finish(world: World, results: Sequence[DispatchResult | CombineResult]) -> None:
    for rank, result in enumerate(results):
        world.on(rank)
        assert result.finish is not None
        result.finish()
