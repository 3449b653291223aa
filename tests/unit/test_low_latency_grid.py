"""How many blocks low-latency kernels get: no more than run at once, and one per row while there are enough."""

from __future__ import annotations

from typing import Any

import pytest
from fake_gpu import FakeKernel, fake_gpu

from deepep.cuda.ll_grid import MAX_TEAM, MIN_TEAM, DispatchGrid, Grids
from deepep.cuda.ll_structs import Shape

NUM_SMS, DISPATCH, COMBINE = 132, 1, 2
ROW_VECS = 7168 // 16


@pytest.fixture(autouse=True)
def _an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, NUM_SMS)


def make_grids(num_ranks: int, num_max_tokens: int, ranks_per_gpu: int = 1, hidden: int = 7168) -> Grids:
    kernels: Any = FakeKernel(DISPATCH), FakeKernel(COMBINE)
    return Grids(Shape(num_ranks, 256, 8, num_max_tokens, hidden), 0, ranks_per_gpu, *kernels)


def test_few_rows_have_a_block_each_or_several() -> None:
    def grid(num_tokens: int, ranks_per_gpu: int = 1) -> tuple[int, ...]:
        grid = make_grids(2, 128, ranks_per_gpu).dispatch(num_tokens, 0, ROW_VECS, False)
        assert not grid.keeps_own
        assert grid.tokens_per_block == 1
        return grid.num_blocks, grid.team, grid.send_parts, grid.recv_parts

    assert grid(8) == (64, MIN_TEAM, 4, 4)
    assert grid(16) == (128, MIN_TEAM, 4, 4)
    assert grid(17) == (68, 2 * MIN_TEAM, 2, 2)
    assert grid(34) == (68, MAX_TEAM, 1, 1)
    assert grid(8, 2) == (32, 2 * MIN_TEAM, 2, 2)
    assert grid(17, 2) == (34, MAX_TEAM, 1, 1)


def test_a_short_row_is_not_shared() -> None:
    grid = make_grids(2, 128).dispatch(8, 0, MIN_TEAM, False)
    assert (grid.team, grid.send_parts, grid.recv_parts) == (MIN_TEAM, 1, 1)


def test_more_rows_than_blocks_leave_out_those_that_stay() -> None:
    assert make_grids(2, 128).dispatch(128, 0, ROW_VECS, False) == DispatchGrid(129, MAX_TEAM, 1, keeps_own=True)
    assert make_grids(2, 4096).dispatch(129, 0, ROW_VECS, False) == DispatchGrid(132, MAX_TEAM // 2, 1, keeps_own=True)
    assert make_grids(2, 4096).dispatch(2000, 0, ROW_VECS, False).keeps_own
    assert make_grids(2, 128).combine(128, 0, False, False)[:2] == (129, MAX_TEAM)


def test_rows_that_stay_take_the_window_between_two_phases() -> None:
    grids = make_grids(2, 128)
    assert not grids.dispatch(128, 0, ROW_VECS, True).keeps_own
    assert not grids.combine(128, 0, False, True).keeps_own
    assert grids.combine(128, 0, False, False).keeps_own
    assert not grids.combine(128, 0, True, False).keeps_own


def test_teams_share_a_row_while_there_is_a_block_for_each() -> None:
    assert make_grids(2, 128).combine(8, 0, False, False)[2:] == (False, False, 2, 2)
    assert make_grids(2, 128).combine(66, 0, False, False).has_workers is False
    assert make_grids(2, 128).combine(67, 0, False, False)[2:] == (True, True, 1, 1)
    assert make_grids(2, 128, ranks_per_gpu=2).combine(34, 0, False, False).has_workers
    assert [make_grids(8, 128, 8).combine(tokens, 0, False, False).has_workers for tokens in (8, 9)] == [False, True]
    assert make_grids(2, 128).combine(67, 0, True, False)[2:] == (False, False, 1, 1)


@pytest.mark.parametrize(("hidden", "team"), [(64, 128), (1536, 128), (2048, 256), (4096, 512), (7168, 512)])
def test_a_team_with_workers_has_a_row_under_way(hidden: int, team: int) -> None:
    grid = make_grids(2, 4096, hidden=hidden).combine(4096, 0, False, False)
    assert (grid.team, grid.home_parts) == (team, 1)


def test_teams_draw_halves_of_rows_where_each_has_few() -> None:
    assert make_grids(2, 128, ranks_per_gpu=2).combine(128, 0, False, False).home_parts == 2
    assert make_grids(2, 512, ranks_per_gpu=2).combine(512, 0, False, False).home_parts == 1
    assert make_grids(2, 128, ranks_per_gpu=2, hidden=2048).combine(128, 0, False, False).home_parts == 1


def test_teams_stay_small_where_a_token_has_few_rows() -> None:
    assert make_grids(4, 4096).combine(4096, 0, False, False)[:2] == (NUM_SMS, MIN_TEAM)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 32, 128, 4000])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("ranks_per_gpu", "num_sms"), [(1, 0), (1, 24), (2, 0), (8, 0), (8, 2), (200, 0)])
def test_all_blocks_run_at_once(num_tokens: int, num_ranks: int, ranks_per_gpu: int, num_sms: int) -> None:
    grids = make_grids(num_ranks, 4096, ranks_per_gpu)
    most = max(1, min(NUM_SMS // ranks_per_gpu, num_sms or NUM_SMS))
    for split_phases in (False, True):
        for num_blocks, team, *_ in (
            grids.dispatch(num_tokens, num_sms, ROW_VECS, split_phases),
            grids.combine(num_tokens, num_sms, False, split_phases),
            grids.combine(num_tokens, num_sms, True, split_phases),
        ):
            assert 1 <= num_blocks <= most
            assert team in (MIN_TEAM, 2 * MIN_TEAM, MAX_TEAM)


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 8, 16, 33, 128])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("ranks_per_gpu", [1, 2, 8])
def test_all_parts_of_all_tokens_have_a_block(num_tokens: int, num_ranks: int, ranks_per_gpu: int) -> None:
    grid = make_grids(num_ranks, 128, ranks_per_gpu).dispatch(num_tokens, 0, ROW_VECS, False)
    senders = max(grid.num_blocks - 1, 1)
    assert senders // grid.send_parts * grid.tokens_per_block >= num_tokens
    if grid.recv_parts > 1:
        assert not grid.keeps_own, "parts of rows that stay are nobody's"
        assert num_tokens * num_ranks * grid.recv_parts <= grid.num_blocks
    else:
        assert grid.send_parts == 1
