"""Properties that hold for any routing, whoever computes the expected numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepep.testing.routing import PATTERNS, Case, Inputs, make_all_inputs
from deepep.testing.target import Target

if TYPE_CHECKING:
    from conftest import Ranks

_FEW = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
_SURFACES = ("normal", "low_latency_per_rank", "low_latency_per_copy", "compact", "expanded")
_HIDDEN = 128


@dataclass(frozen=True)
class Batch:
    """What every rank sends."""

    case: Case
    inputs: list[Inputs]


@st.composite
def batches(draw: st.DrawFn, num_ranks: int) -> Batch:
    num_tokens = tuple(draw(st.integers(0, 9)) for _ in range(num_ranks))
    case = Case(
        num_tokens,
        hidden=_HIDDEN,
        num_experts=num_ranks * draw(st.integers(2, 5)),
        num_topk=draw(st.integers(1, 2)),
        num_max_tokens_per_rank=16,
        pattern=draw(st.sampled_from(sorted(PATTERNS))),
        seed=draw(st.integers(0, 1 << 30)),
    )
    return Batch(case, make_all_inputs(case))


def moe(group: Any, target: Target, surface: str, batches_: list[Batch], is_identity: bool) -> list[torch.Tensor]:
    """Dispatch, apply elementwise experts, weigh, combine; one result [T, H] per batch, from one buffer."""
    case = batches_[0].case
    if surface.startswith("low_latency"):
        buffer = target.buffer(group, case, low_latency_mode=True)
    elif surface == "normal":
        buffer = target.buffer(group, case)
    else:
        buffer = target.elastic_buffer(group, case)
    results = []
    for batch in batches_:
        mine = batch.inputs[group.rank()]
        x, idx, weights = target.put(mine.x), target.put(mine.topk_idx), target.put(mine.topk_weights)
        scale = _expert_scales(batch.case, is_identity).to(x.device)
        local_scale = scale.view(case.num_ranks, -1)[group.rank()]
        results.append(_FORMS[surface.partition("_per_")[0]](buffer, case, x, idx, weights, local_scale, surface).cpu())
    buffer.destroy()
    return results


def _normal(buffer: Any, case: Case, x: Any, idx: Any, weights: Any, scale: Any, _surface: str) -> torch.Tensor:
    per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, case.num_experts)
    recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
        x,
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_host,
        num_tokens_per_expert=per_expert,
        is_token_in_rank=in_rank,
    )
    return buffer.combine(_apply_compact(recv_x, recv_idx, recv_weights, scale), handle)[0]


def _compact(buffer: Any, case: Case, x: Any, idx: Any, weights: Any, scale: Any, _surface: str) -> torch.Tensor:
    recv_x, recv_idx, recv_weights, handle, _ = buffer.dispatch(
        x, topk_idx=idx, topk_weights=weights, num_experts=case.num_experts
    )
    return buffer.combine(_apply_compact(recv_x, recv_idx, recv_weights, scale), handle)[0]


def _expanded(buffer: Any, case: Case, x: Any, idx: Any, weights: Any, scale: Any, _surface: str) -> torch.Tensor:
    recv_x, _, recv_weights, handle, _ = buffer.dispatch(
        x, topk_idx=idx, topk_weights=weights, num_experts=case.num_experts, do_expand=True
    )
    counts = torch.tensor(handle.num_recv_tokens_per_expert_list, device=x.device)
    factor = recv_weights * scale.repeat_interleave(counts)
    return buffer.combine((recv_x.float() * factor.unsqueeze(1)).to(x.dtype), handle)[0]


def _low_latency(buffer: Any, case: Case, x: Any, idx: Any, weights: Any, scale: Any, surface: str) -> torch.Tensor:
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
        x, idx, case.num_max_tokens_per_rank, case.num_experts, use_fp8=False
    )
    y = (recv_x.float() * scale.view(-1, 1, 1)).to(x.dtype)
    return buffer.low_latency_combine(y, idx, weights, handle, reduction=surface.removeprefix("low_latency_"))[0]


_FORMS: dict[str, Any] = {"normal": _normal, "compact": _compact, "expanded": _expanded, "low_latency": _low_latency}


def _apply_compact(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    factor = (weights * scale[idx.clamp(min=0)] * (idx >= 0)).sum(dim=1, keepdim=True)
    return (x.float() * factor).to(x.dtype)


def _expert_scales(case: Case, is_identity: bool) -> torch.Tensor:
    return torch.ones(case.num_experts) if is_identity else 1 + torch.arange(case.num_experts) / 7


def _permuted(one: Inputs, order: torch.Tensor) -> Inputs:
    return replace(one, x=one.x[order], topk_idx=one.topk_idx[order], topk_weights=one.topk_weights[order])


def _exact(one: Inputs) -> Inputs:
    """Small whole numbers and weights of powers of two: no sum of them is ever rounded."""
    x = (one.x.float() * 4).round().clamp(-8, 8).to(one.x.dtype)
    weights = 2.0 ** -(one.topk_weights * 2).round()
    return replace(one, x=x, topk_weights=weights)


@pytest.mark.parametrize("surface", _SURFACES)
def test_identity_experts_give_x_times_the_sum_of_weights(ranks: Ranks, surface: str) -> None:
    @_FEW
    @given(batches(ranks.num_ranks))
    def holds(batch: Batch) -> None:
        inputs = [_exact(one) for one in batch.inputs]
        results = ranks.run(moe, ranks.target, surface, [replace(batch, inputs=inputs)], True)
        for one, (y,) in zip(inputs, results, strict=True):
            total = (one.topk_weights * (one.topk_idx >= 0)).sum(dim=1, keepdim=True)
            assert torch.equal(y.float(), one.x.float() * total)

    holds()


@pytest.mark.parametrize("surface", _SURFACES)
def test_permuting_tokens_permutes_results(ranks: Ranks, surface: str) -> None:
    @_FEW
    @given(batches(ranks.num_ranks), st.integers(0, 1 << 30))
    def holds(batch: Batch, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(one.x), generator=generator) for one in batch.inputs]
        permuted = [_permuted(one, order) for one, order in zip(batch.inputs, orders, strict=True)]
        pair = [batch, replace(batch, inputs=permuted)]
        for order, (y, again) in zip(orders, ranks.run(moe, ranks.target, surface, pair, False), strict=True):
            assert torch.equal(y[order], again)

    holds()


@pytest.mark.parametrize("surface", _SURFACES)
def test_a_token_gets_the_same_bits_in_any_batch(ranks: Ranks, surface: str) -> None:
    @_FEW
    @given(batches(ranks.num_ranks), st.integers(0, 1 << 30))
    def holds(batch: Batch, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        kept = [torch.rand(len(one.x), generator=generator) < 0.6 for one in batch.inputs]
        kept[seed % ranks.num_ranks][:] = False  # one rank falls idle
        smaller = [_permuted(one, keep.nonzero().flatten()) for one, keep in zip(batch.inputs, kept, strict=True)]
        pair = [batch, replace(batch, inputs=smaller)]
        for keep, (y, again) in zip(kept, ranks.run(moe, ranks.target, surface, pair, False), strict=True):
            assert torch.equal(y[keep], again)

    holds()
