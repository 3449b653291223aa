"""Bad input and ranks that disagree: a named error on every rank, and the buffer goes on (CONTRACT, 'Errors')."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scenes import BF16, E, H, K, M, Outcome, Scene, T, assert_says, attempt

import deepep
from deepep.testing.launch import Workers


def _spoilt(**changed: Any) -> dict[str, Any]:
    return changed


def _idx(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


# name -> (method of Scene, what to change, what the message must say)
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "x is no tensor": ("dispatch", _spoilt(x=[1.0]), "x is a list"),
    "x has one dimension": ("dispatch", _spoilt(x=torch.ones(H)), r"x is float32 \[128\].*contiguous \[rows, H\]"),
    "x is not contiguous": ("dispatch", _spoilt(x=torch.ones(H, T).T), "not contiguous"),
    "odd row size": ("dispatch", _spoilt(x=torch.ones(T, 5)), r"5 x 4 = 20 bytes.*multiple of 16"),
    "empty rows": ("dispatch", _spoilt(x=torch.ones(T, 0)), "0 bytes"),
    "sf has two-byte elements": ("dispatch", _spoilt(x=(torch.ones(T, H), torch.ones(T, 1, dtype=BF16))), "sf is"),
    "sf has other rows": ("dispatch", _spoilt(x=(torch.ones(T, H), torch.ones(T + 1, 1))), r"\[T=4, n\]"),
    "topk_idx is int32": ("dispatch", _spoilt(topk_idx=_idx([0, 1]).int().repeat(T, 1)), "int32.*topk_idx_t"),
    "topk_idx is a list": ("dispatch", _spoilt(topk_idx=[[0, 1]] * T), "topk_idx is a list"),
    "topk_idx has other rows": ("dispatch", _spoilt(topk_idx=_idx([0, 1])), "1 rows and x has 4"),
    "topk_idx is elsewhere": ("dispatch", _spoilt(topk_idx=torch.ones(T, K, dtype=torch.int64, device="meta")), "meta"),
    "no column": ("dispatch", _spoilt(topk_idx=torch.ones(T, 0, dtype=torch.int64)), "K = 0"),
    "too many columns": ("dispatch", _spoilt(topk_idx=torch.ones(T, 65, dtype=torch.int64)), "K = 65.*1 to 64"),
    "expert above E": ("dispatch", _spoilt(topk_idx=_idx([0, E]).repeat(T, 1)), "from 0 to 8.*0 to 7"),
    "expert below -1": ("dispatch", _spoilt(topk_idx=_idx([0, -2]).repeat(T, 1)), "from -2 to 0"),
    "expert twice": ("dispatch", _spoilt(topk_idx=_idx([0, 1], [3, 3], [0, 1], [0, 1])), "token 1 names the same"),
    "weights of another type": ("dispatch", _spoilt(topk_weights=torch.ones(T, K).double()), "float64.*float32"),
    "weights of another shape": ("dispatch", _spoilt(topk_weights=torch.ones(T, K + 1)), r"\[4, 3\].*\[4, 2\]"),
    "weights without experts": ("dispatch", _spoilt(topk_idx=None), "topk_weights without topk_idx"),
    "no layout": ("dispatch", _spoilt(num_tokens_per_expert=None), "get_dispatch_layout"),
    "nothing that routes": ("dispatch", _spoilt(topk_idx=None, is_token_in_rank=None), "topk_idx and is_token_in_rank"),
    "E is no multiple of R": (
        "dispatch", _spoilt(num_tokens_per_expert=torch.zeros(7, dtype=torch.int32)), "num_experts is 7.*the 2 ranks",
    ),
    "counts are a list": ("dispatch", _spoilt(num_tokens_per_expert=[0] * E), "num_tokens_per_expert is a list"),
    "counts are int64": ("dispatch", _spoilt(num_tokens_per_expert=torch.zeros(E).long()), r"int64 \[8\].*int32 \[8\]"),
    "foreign layout": (
        "dispatch", _spoilt(is_token_in_rank=torch.ones(T, 2, dtype=torch.bool)), "does not follow from topk_idx",
    ),
    "layout of another size": ("dispatch", _spoilt(is_token_in_rank=torch.ones(T, 3, dtype=torch.bool)), r"\[4, 2\]"),
    "counts of ranks are a list": ("dispatch", _spoilt(num_tokens_per_rank=[2, 2]), "num_tokens_per_rank is a list"),
    "counts of hosts are many": (
        "dispatch", _spoilt(num_tokens_per_rdma_rank=torch.zeros(2).int()), r"per_rdma_rank is .*int32 \[1\]",
    ),
    "worst-case rows are no whole number": ("dispatch", _spoilt(num_worst_tokens=16.0), "num_worst_tokens is 16.0"),
    "alignment 0": ("dispatch", _spoilt(expert_alignment=0), "expert_alignment is 0"),
    "alignment in words": ("dispatch", _spoilt(expert_alignment="4"), "alignment is '4'; it must be a whole"),
    "no config": ("dispatch", _spoilt(config=3), "wrong kind: AttributeError: 'int' object has no attribute 'num_sms'"),
    "negative worst case": ("dispatch", _spoilt(num_worst_tokens=-1), "num_worst_tokens is -1"),
    "allocation without event": (
        "dispatch", _spoilt(allocate_on_comm_stream=True, async_finish=True), "needs previous_event",
    ),
    "no handle": ("cached", _spoilt(handle=(1, 2)), "handle is a tuple"),
    "handle and experts": ("cached", _spoilt(topk_idx=_idx([0, 1]).repeat(T, 1)), "handle repeats a routing"),
    "cached with other rows": ("cached", _spoilt(x=torch.ones(T + 1, H)), "5 rows; the handle's dispatch has 4"),
    "cached elsewhere": ("cached", _spoilt(x=torch.ones(T, H, device="meta")), "x is on meta.*dispatch on cpu"),
    "combine elsewhere": ("combine", _spoilt(x=torch.ones(6, H, device="meta")), "x (is on meta|has 6 rows)"),
    "combine other rows": ("combine", _spoilt(x=torch.ones(99, H, dtype=BF16)), "x has 99 rows"),
    "combine no tensor": ("combine", _spoilt(x=None), "x is a NoneType"),
    "combine integers": ("combine", _spoilt(x="int32"), "int32; sums are over"),
    "combine with other weights": ("combine", _spoilt(topk_weights=torch.ones(1)), "topk_weights is"),
    "combine with three biases": ("combine", _spoilt(bias=[torch.ones(T, H, dtype=BF16)] * 3), "3 tensors"),
    "combine with another bias": ("combine", _spoilt(bias=torch.ones(T, H)), r"bias is float32.*bfloat16 \[4, 128\]"),
    "low latency: T > M": ("ll_dispatch", _spoilt(num_max_dispatch_tokens_per_rank=3), "T = 4 tokens.*allows 3"),
    "low latency: fp16": ("ll_dispatch", _spoilt(x=torch.ones(T, H).half()), "float16; it must be bfloat16"),
    "low latency: M is 0": ("ll_dispatch", _spoilt(num_max_dispatch_tokens_per_rank=0), "is 0.*at least 1"),
    "low latency: M is no whole number": ("ll_dispatch", _spoilt(num_max_dispatch_tokens_per_rank=8.0), "is 8.0"),
    "low latency: E % R": ("ll_dispatch", _spoilt(num_experts=7), "num_experts is 7"),
    "low latency: expert twice": ("ll_dispatch", _spoilt(topk_idx=_idx([1, 1]).repeat(T, 1)), "same expert twice"),
    "low latency: odd hidden": ("ll_dispatch", _spoilt(x=torch.ones(T, 72, dtype=BF16)), "hidden is 72.*128"),
    "low latency: UE8M0": ("ll_dispatch", _spoilt(use_ue8m0=True), "round_scale"),
    "low latency: hook and event": ("ll_dispatch", _spoilt(async_finish=True, return_recv_hook=True), "exclude each"),
    "low latency: statistics": (
        "ll_dispatch", _spoilt(cumulative_local_expert_recv_stats=torch.zeros(3, dtype=torch.int32)), r"int32 \[4\]",
    ),
    "low latency: scattered statistics": (
        "ll_dispatch", _spoilt(cumulative_local_expert_recv_stats=torch.zeros(8).int()[::2]), "must be contiguous",
    ),
    "low latency: costs": ("ll_dispatch", _spoilt(dispatch_wait_recv_cost_stats=torch.zeros(2)), r"int64 \[2\]"),
    "low latency: no handle": ("ll_combine", _spoilt(handle=None), "handle is a NoneType.*LowLatencyHandle"),
    "low latency: x": ("ll_combine", _spoilt(x=torch.ones(2, 3, dtype=BF16)), r"bfloat16 \[4, 12, 128\]"),
    "low latency: no weights": ("ll_combine", _spoilt(topk_weights=None), "topk_weights is needed"),
    "low latency: out": ("ll_combine", _spoilt(out=torch.ones(T, H)), r"out is float32.*bfloat16 \[4, 128\]"),
    "low latency: scattered out": ("ll_combine", _spoilt(out=torch.ones(H, T, dtype=BF16).T), "out is.*contiguous"),
    "low latency: other K": (
        "ll_combine", _spoilt(topk_idx=_idx([0], [1], [7], [-1]), topk_weights=torch.ones(T, 1)), "K = 1.*had 2",
    ),
    "low latency: clean": ("clean", _spoilt(hidden=0), "hidden is 0"),
    "low latency: two casts": ("ll_combine", _spoilt(zero_copy=True, use_logfmt=True), "exclude each other"),
    "low latency: nothing filled": ("ll_combine", _spoilt(zero_copy=True), "call that first and fill it"),
    "low latency: reduction": ("ll_combine", _spoilt(reduction="mean"), "'mean'.*'per_rank' or 'per_copy'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_on_every_rank(pair: Workers, name: str) -> None:
    _, _, pattern = BAD[name]
    everywhere, only_at_one = zip(*pair.run(refuse, name), strict=True)
    for kind, text in everywhere:
        assert kind == "InvalidArgument"
        assert_says(text, pattern)
        assert text.startswith(("dispatch:", "combine:", "low_latency_", "clean_low_latency_"))
    (kind, text), (own_kind, own_text) = only_at_one
    assert (kind, own_kind) == ("InvalidArgument", "InvalidArgument")
    assert text.endswith(f"rank 1 refused: {own_text}")


def refuse(group: Any, name: str) -> list[Outcome]:
    """Spoil the call on both ranks, then on rank 1 alone; a good call in between and at the end must go through."""
    method, changed, _ = BAD[name]
    if changed.get("x") == "int32":
        changed = {"x": torch.ones(6 - 2 * group.rank(), H, dtype=torch.int32)}
    scene = Scene(deepep.Buffer(group, backend="reference", timeout=20))
    call = getattr(scene, method)
    outcomes = [attempt(call, **changed)]
    call()
    outcomes.append(attempt(call, **(changed if group.rank() == 1 else {})))
    call()
    scene.buffer.destroy()
    return outcomes


def test_what_one_rank_cannot_do_is_refused_on_every_rank(pair: Workers) -> None:
    (kind, text), (own_kind, own_text) = pair.run(ask_for_too_much)
    assert (kind, own_kind) == ("InvalidArgument", "UnsupportedOperation")
    assert_says(own_text, "dispatch: backend 'reference' does not work on cpu tensors")
    assert text.endswith(f"rank 1 refused: {own_text}")


def ask_for_too_much(group: Any) -> Outcome:
    """Rank 1's backend takes no CPU tensors, as one for GPUs would not; afterwards a good call goes through."""
    scene = Scene(deepep.Buffer(group, backend="reference", timeout=20))
    devices = scene.buffer._devices
    if group.rank() == 1:
        scene.buffer._devices = frozenset({"cuda"})
    outcome = attempt(scene.dispatch)
    scene.buffer._devices = devices
    scene.dispatch()
    scene.buffer.destroy()
    return outcome


# name -> (what rank 1 does, what both are told)
DISAGREEMENTS: dict[str, tuple[Callable[[Scene], Any], str]] = {
    "hidden": (lambda s: s.dispatch(x=torch.ones(T, 2 * H, dtype=BF16)), "hidden.*128.*256"),
    "dtype": (lambda s: s.dispatch(x=torch.ones(T, H).half()), "dtype.*bfloat16.*float16"),
    "E": (
        lambda s: s.dispatch(num_tokens_per_expert=torch.zeros(2 * E).int(), is_token_in_rank=None),
        "num_experts.*8.*16",
    ),
    "K": (lambda s: s.dispatch(topk_idx=_idx([0]).repeat(T, 1), topk_weights=None, is_token_in_rank=None), "num_topk"),
    "weights": (lambda s: s.dispatch(topk_weights=None), "topk_weights.*True.*False"),
    "scale factors": (lambda s: s.dispatch(x=(s.x, torch.ones(T, 2))), "scale factors.*None.*2"),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_get_the_same_error(pair: Workers, name: str) -> None:
    first, second = pair.run(disagree, name)
    assert first == second
    assert first[0] == "InvalidArgument"
    assert_says(first[1], f"ranks disagree about.*{DISAGREEMENTS[name][1]}")
    assert_says(first[1], "rank 0 has.*rank 1 has")


def disagree(group: Any, name: str) -> Outcome:
    scene = Scene(deepep.Buffer(group, backend="reference", timeout=20))
    outcome = attempt(DISAGREEMENTS[name][0], scene) if group.rank() == 1 else attempt(scene.dispatch)
    scene.dispatch()
    return outcome


def test_ranks_that_disagree_about_m(pair: Workers) -> None:
    first, second = pair.run(disagree_about_m)
    assert first == second
    assert_says(first[1], "num_max_tokens_per_rank: rank 0 has 6 and rank 1 has 7")


def disagree_about_m(group: Any) -> Outcome:
    scene = Scene(deepep.Buffer(group, backend="reference", timeout=20))
    return attempt(scene.ll_dispatch, num_max_dispatch_tokens_per_rank=M + group.rank())


def test_too_few_worst_tokens_names_the_number(pair: Workers) -> None:
    outcomes = pair.run(too_few)
    assert outcomes[0] == outcomes[1]
    kind, text = outcomes[0]
    assert kind == "InvalidArgument"
    # Tokens 0, 1 and 2 of both ranks go to rank 0, tokens 0 and 2 to rank 1.
    assert_says(text, "6 rows arrive at rank 0.*num_worst_tokens is 5.*at least 6")


def too_few(group: Any) -> Outcome:
    scene = Scene(deepep.Buffer(group, backend="reference", timeout=20))
    outcome = attempt(scene.dispatch, num_worst_tokens=5)
    scene.dispatch(num_worst_tokens=6)
    return outcome


def test_handle_of_other_ranks(pair: Workers) -> None:
    for outcomes in pair.run(foreign_handles):
        for kind, text in outcomes:
            assert kind == "InvalidArgument"
            assert "handle is of another backend or other ranks" in text or "pass the LowLatencyHandle" in text


def foreign_handles(group: Any) -> list[Outcome]:
    ours, other = (Scene(deepep.Buffer(group, backend="reference", timeout=20)) for _ in range(2))
    other.buffer._owner += 1  # as of other processes
    normal, low_latency = other.dispatch()[4], other.ll_dispatch()[2]
    return [
        attempt(ours.cached, handle=normal),
        attempt(ours.combine, handle=normal),
        attempt(ours.ll_combine, handle=low_latency),
        attempt(ours.ll_combine, handle=normal),
        attempt(ours.buffer.get_next_low_latency_combine_buffer, low_latency),
    ]


def test_layout_checks_its_arguments(pair: Workers) -> None:
    for kind, text in pair.run(bad_layouts)[0]:
        assert kind == "InvalidArgument"
        assert_says(text, "^get_dispatch_layout: (topk_idx|num_experts|token 0|allocate_on_comm_stream)")


def bad_layouts(group: Any) -> list[Outcome]:
    layout = deepep.Buffer(group, backend="reference").get_dispatch_layout
    good = _idx([0, 1])
    calls: list[tuple[Any, ...]] = [
        (good.int(), E),
        (_idx([0, 1], [2, 3]).T, E),
        (good, 7),
        (good, 0),
        (good, 1.5),
        (good * 8, E),
    ]
    calls += [(_idx([2, 2]), E), (good, E, None, True, True), (good, E, layout, False, True)]
    return [attempt(layout, *call) for call in calls]
