"""Handles: of which buffers they are, and ranks whose handles are not of the same dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scenes import BF16, E, H, K, M, Outcome, Scene, T, assert_says, attempt

import deepep
from deepep.layout import dispatch_layout
from deepep.testing.launch import Workers


def _scene(group: Any) -> Scene:
    return Scene(deepep.Buffer(group, backend="reference", timeout=20))


def test_handles_outlive_the_buffer_that_made_them(pair: Workers) -> None:
    """Programs build a larger buffer when they meet a larger layer, and go back through the smaller one later."""
    assert all(pair.run(use_after_rebuilding))


def use_after_rebuilding(group: Any) -> bool:
    old = _scene(group)
    recv_x, _, recv_weights, _, handle, _ = old.dispatch()
    expected = old.buffer.combine(recv_x, handle, topk_weights=recv_weights)
    padded, _, padded_handle, _, _ = old.ll_dispatch(use_fp8=False)
    padded_expected = old.buffer.low_latency_combine(padded, old.topk_idx, old.topk_weights, padded_handle)[0]
    old.buffer.destroy()
    new = _scene(group)
    again = new.buffer.combine(recv_x, handle, topk_weights=recv_weights)
    same = torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])
    same &= torch.equal(new.cached(handle=handle)[0], recv_x)
    padded_again = new.buffer.low_latency_combine(padded, old.topk_idx, old.topk_weights, padded_handle)[0]
    return same and torch.equal(padded_again, padded_expected)


HANDLES = "rank . has . rows for rank ., whose handle says .; all ranks must pass the handle of the same"


def mix_cached(group: Any) -> Outcome:
    return mix_handles(group, "cached")


def mix_combined(group: Any) -> Outcome:
    return mix_handles(group, "combine")


def mix_handles(group: Any, what: str) -> Outcome:
    scene = _scene(group)
    here = scene.dispatch()
    scene.topk_idx = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    there = scene.dispatch()
    recv_x, handle = (here if group.rank() == 0 else there)[0], (here if group.rank() == 0 else there)[4]
    if what == "cached":
        outcome = attempt(scene.cached, handle=handle)
    else:
        outcome = attempt(scene.buffer.combine, recv_x, handle)
    scene.combine()
    return outcome


def mix_columns(group: Any) -> Outcome:
    scene = _scene(group)
    recv_x, _, _, _, handle, _ = scene.dispatch(topk_idx=None, topk_weights=None)
    outcome = attempt(scene.buffer.combine, recv_x, handle, topk_weights=torch.ones(recv_x.shape[0], 2 + group.rank()))
    scene.combine()
    return outcome


def mix_scale_factors(group: Any) -> Outcome:
    dtype = (torch.float32, torch.int32)[group.rank()]
    return attempt(_scene(group).dispatch, x=(torch.ones(T, H), torch.ones(T, 1).to(dtype)))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (mix_cached, HANDLES),
        (mix_combined, HANDLES),
        (mix_columns, "ranks disagree about num_topk: rank 0 has 2 and rank 1 has 3"),
        (mix_scale_factors, "ranks disagree about dtype of scale factors: rank 0 has torch.float32 and rank 1 has"),
    ],
)
def test_what_does_not_go_together_is_refused_alike(pair: Workers, mix: Callable[[Any], Outcome], message: str) -> None:
    first, second = pair.run(mix)
    assert first == second
    assert first[0] == "InvalidArgument"
    assert_says(first[1], message)


def test_scale_factors_come_as_they_went(pair: Workers) -> None:
    for flat, wide in pair.run(send_scale_factors):
        assert (flat, wide) == (1, 2)


def send_scale_factors(group: Any) -> tuple[int, int]:
    scene = _scene(group)
    flat, wide = ((torch.ones(T, H), torch.ones(shape)) for shape in ((T,), (T, 1)))
    return scene.dispatch(x=flat)[0][1].dim(), scene.dispatch(x=wide)[0][1].dim()


def test_inputs_may_require_gradients(pair: Workers) -> None:
    """As kernels take them: by their values. On one rank only, since the others must not notice."""
    for outcome, requires in pair.run(send_parameters):
        assert outcome is None
        assert not requires


def send_parameters(group: Any) -> tuple[Outcome, bool]:
    scene = _scene(group)
    if group.rank() == 0:
        scene.x.requires_grad_()
        scene.topk_weights.requires_grad_()
    results: list[torch.Tensor] = []

    def everything() -> None:
        recv_x, _, recv_weights, _, handle, _ = scene.dispatch()
        bias = torch.ones(T, H, dtype=BF16, requires_grad=True)
        results.extend([recv_x, recv_weights, *scene.buffer.combine(recv_x, handle, recv_weights, bias)[:2]])
        padded, _, padded_handle, _, _ = scene.ll_dispatch(use_fp8=False)
        for reduction in ("per_rank", "per_copy"):
            arguments = (padded, scene.topk_idx, scene.topk_weights, padded_handle)
            results.append(scene.buffer.low_latency_combine(*arguments, reduction=reduction)[0])

    outcome = attempt(everything)
    return outcome, any(result.requires_grad for result in results)


@pytest.mark.parametrize("reduction", ["per_rank", "per_copy"])
def test_choices_are_kept_as_sent(pair: Workers, reduction: str) -> None:
    """Decoders have one tensor of choices, which they fill again for the next batch."""
    assert all(pair.run(refill_choices, reduction))


def refill_choices(group: Any, reduction: str) -> bool:
    scene = _scene(group)
    static = scene.topk_idx.clone()
    padded, _, handle, _, _ = scene.ll_dispatch(topk_idx=static, use_fp8=False)
    arguments = (scene.topk_idx, scene.topk_weights, handle)
    expected = scene.buffer.low_latency_combine(padded, *arguments, reduction=reduction)[0]
    static.fill_(-1)
    return torch.equal(scene.buffer.low_latency_combine(padded, *arguments, reduction=reduction)[0], expected)


def test_numbers_of_numpy_are_numbers(pair: Workers) -> None:
    assert pair.run(count_with_numpy) == [None, None]


def count_with_numpy(group: Any) -> Outcome:
    scene = _scene(group)

    def everything() -> None:
        scene.buffer.get_dispatch_layout(scene.topk_idx, np.int64(E))
        scene.dispatch(expert_alignment=np.int32(2), num_worst_tokens=np.int64(2 * T))
        scene.ll_dispatch(num_experts=np.int64(E), num_max_dispatch_tokens_per_rank=np.int32(M))

    return attempt(everything)


def test_flags_of_the_cast_say_nothing_without_a_cast(pair: Workers) -> None:
    assert all(pair.run(send_with_idle_flags))


def send_with_idle_flags(group: Any) -> bool:
    scene = _scene(group)
    plain, _, _, _, _ = scene.ll_dispatch(use_fp8=False)
    flagged, _, _, _, _ = scene.ll_dispatch(use_fp8=False, round_scale=True, use_ue8m0=True)
    return isinstance(flagged, torch.Tensor) and flagged.dtype == BF16 and flagged.shape == plain.shape


def test_an_operation_that_fails_half_way_breaks_the_buffer(pair: Workers) -> None:
    (kind, text), (other_kind, _) = pair.run(fail_half_way)
    assert kind == "BufferDestroyed"
    assert_says(text, "this buffer broke earlier .(RuntimeError|MemoryError)")
    assert other_kind == "BufferDestroyed"


def fail_half_way(group: Any) -> Outcome:
    """Rank 0 asks for more memory than there is; rank 1 waits for rows in vain. Nothing is sent after that."""
    scene = Scene(deepep.Buffer(group, backend="reference", timeout=2))
    attempt(scene.dispatch, num_worst_tokens=10**14 if group.rank() == 0 else 2 * T)
    return attempt(scene.dispatch)


def test_layout_across_hosts_of_a_rank_without_tokens() -> None:
    layout = dispatch_layout(torch.zeros(0, K, dtype=torch.int64), E, 4, 2)
    assert layout.num_tokens_per_rdma_rank is not None
    assert layout.num_tokens_per_rdma_rank.tolist() == [0, 0]
