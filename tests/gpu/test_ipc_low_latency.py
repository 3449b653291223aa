"""Low latency on GPUs: graphs, repeatability, ranks that leave."""

from __future__ import annotations

import pytest
from low_latency_steps import (
    clean_alone,
    lose_without_masks,
    mix_calls,
    pass_on_any_bits,
    repeat_bitwise,
    replay_graphs,
    shrink,
    take_back,
    write_inputs_late,
)

from deepep.testing.launch import spawn


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_graphs_and_eager_calls_take_turns_over_changing_routing(num_ranks: int) -> None:
    assert spawn(replay_graphs, num_ranks, 1000, device="cuda", timeout=200) == [0] * num_ranks


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("writer", ["kernel", "copy"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_kernel_that_starts_early_waits_for_its_inputs(num_ranks: int, writer: str, is_async: bool) -> None:
    results = spawn(write_inputs_late, num_ranks, writer, is_async, 50, device="cuda", timeout=100)
    assert results == [0] * num_ranks


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_repeats_are_bitwise_equal(num_ranks: int) -> None:
    assert spawn(repeat_bitwise, num_ranks, 200, 20, device="cuda", timeout=200) == [0] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_ranks_with_few_and_many_tokens_meet(num_ranks: int) -> None:
    assert spawn(mix_calls, num_ranks, 400, device="cuda", timeout=100) == [0] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_rows_may_hold_any_bits(num_ranks: int) -> None:
    assert spawn(pass_on_any_bits, num_ranks, device="cuda", timeout=100) == [0] * num_ranks


@pytest.mark.parametrize("is_cleaned_without", [False, True])
def test_a_rank_that_is_taken_back_waits_for_clean_windows(is_cleaned_without: bool) -> None:
    assert spawn(take_back, 3, is_cleaned_without, device="cuda", timeout=100) == ["took it back"] * 3


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_rank_that_cleaned_alone_is_taken_back(num_ranks: int) -> None:
    assert spawn(clean_alone, num_ranks, device="cuda", timeout=100) == ["took it back"] * num_ranks


@pytest.mark.parametrize("leave_before", ["dispatch", "combine", "clean"])
def test_survivors_mask_the_rank_that_leaves(leave_before: str) -> None:
    results = spawn(shrink, 3, leave_before, device="cuda", timeout=100)
    assert results == ["went on", "went on", "left"]


def test_a_missing_rank_is_named_by_the_next_call() -> None:
    assert spawn(lose_without_masks, 3, device="cuda", timeout=100) == ["named it"] * 3
