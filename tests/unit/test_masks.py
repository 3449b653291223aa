"""Ranks that are left out in low latency: what the front end promises of masks on any backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import E, H, M, Outcome, Scene, assert_says, attempt

import deepep
from deepep.testing.launch import Workers


def test_masks_need_a_buffer_that_shrinks(pair: Workers) -> None:
    for outcomes in pair.run(mask_misuse):
        for kind, text in outcomes:
            assert kind == "InvalidArgument"
            assert_says(text, "enable_shrink=True|another rank of the group|mask_status is")


def mask_misuse(group: Any) -> list[Outcome]:
    plain = deepep.Buffer(group, backend="reference")
    shrinking = deepep.Buffer(group, backend="reference", enable_shrink=True)
    status = torch.zeros(2, dtype=torch.int32)
    return [
        attempt(plain.low_latency_update_mask_buffer, 1 - group.rank(), True),
        attempt(plain.low_latency_query_mask_buffer, status),
        attempt(plain.low_latency_clean_mask_buffer),
        attempt(shrinking.low_latency_update_mask_buffer, group.rank(), True),
        attempt(shrinking.low_latency_update_mask_buffer, 2, True),
        attempt(shrinking.low_latency_query_mask_buffer, status.long()),
    ]


def test_cleaning_waits_for_those_that_are_not_masked_and_compares_shapes(pair: Workers) -> None:
    outcomes = pair.run(clean)
    for done, bad, differing in outcomes:
        assert done is None
        assert bad[0] == "InvalidArgument"
        assert_says(bad[1], "^clean_low_latency_buffer: num_experts is 7; it must be a positive multiple of the 2")
        assert differing[0] == "InvalidArgument"
        assert_says(differing[1], "clean_low_latency_buffer: ranks disagree about hidden: rank 0 has 128 and rank 1")
    assert outcomes[0] == outcomes[1]


def clean(group: Any) -> list[Outcome]:
    buffer = deepep.Buffer(group, backend="reference", enable_shrink=True, timeout=20)
    done = None
    if group.rank() == 0:
        buffer.low_latency_update_mask_buffer(1, True)
        done = attempt(buffer.clean_low_latency_buffer, M, H, E)  # alone
        buffer.low_latency_clean_mask_buffer()
    bad = attempt(buffer.clean_low_latency_buffer, M, H, 7)
    return [done, bad, attempt(buffer.clean_low_latency_buffer, M, H + 128 * group.rank(), E)]


def test_a_broken_buffer_goes_on_when_those_that_it_missed_are_masked(pair: Workers) -> None:
    (lost, after_one, after_both), _ = pair.run(mask_the_lost)
    assert lost == ("BufferDestroyed", lost[1])
    assert_says(lost[1], "this buffer broke earlier .*rank.s. 1, 2 did not arrive")
    assert after_one == lost
    assert after_both is None


def mask_the_lost(group: Any) -> list[Outcome]:
    buffer = deepep.Buffer(group, backend="reference", enable_shrink=True)
    if group.rank() == 1:
        return []
    scene, outcomes = Scene(buffer), []

    def lose() -> None:
        raise deepep.CommTimeout("test", [1, 2], 1.0)

    with pytest.raises(deepep.CommTimeout):
        buffer._run(lose, (), False, False, None)
    outcomes.append(attempt(scene.ll_combine))
    buffer.low_latency_update_mask_buffer(1, True)
    outcomes.append(attempt(scene.ll_combine))
    buffer._missing.discard(2)  # a third rank, which is not here
    buffer.low_latency_update_mask_buffer(1, True)
    return [*outcomes, attempt(scene.ll_combine)]
