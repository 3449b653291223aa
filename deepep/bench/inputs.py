"""Random inputs from seeds: every rank can make those of any other, so answers are checked without communication."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepep.bench.plan import DTYPES, SF_GROUP, Plan


@dataclass(frozen=True)
class Choice:
    """Where the tokens of one rank go.

    Attributes:
        topk_idx: [T, K] int64.
        topk_weights: [T, K] float32.
        per_rank: [T, R] int64, how many of a token's experts live on each rank.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    per_rank: torch.Tensor


def make_choice(plan: Plan, routing: str, rank: int, num_ranks: int) -> Choice:
    """Choose the experts of one rank's tokens."""
    generator = _generator(plan, rank, 1)
    shape = (plan.num_tokens, plan.num_experts)
    # The largest of (log odds + Gumbel noise) are a sample without replacement in proportion to the odds.
    noise = -torch.log(-torch.log(torch.rand(shape, generator=generator, device=plan.device).clamp(1e-7, 1 - 1e-7)))
    if routing == "unbalanced":
        noise[:, : plan.num_experts // 2] += torch.log(torch.tensor(2.0))
    topk_idx = noise.topk(plan.num_topk, dim=1).indices
    weights = torch.rand(topk_idx.shape, generator=generator, device=plan.device) + 0.1
    owner = topk_idx // (plan.num_experts // num_ranks)
    per_rank = torch.zeros(plan.num_tokens, num_ranks, dtype=torch.int64, device=plan.device)
    per_rank.scatter_add_(1, owner, torch.ones_like(owner))
    return Choice(topk_idx, weights, per_rank)


def make_payload(plan: Plan, rank: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Make [T, H] rows and, for FP8, [T, H / 128] float32 scale factors."""
    generator = _generator(plan, rank, 0)
    x = torch.randn(plan.num_tokens, plan.hidden, generator=generator, device=plan.device)
    if plan.dtype != "fp8":
        return x.to(DTYPES[plan.dtype]), None
    sf = torch.rand(plan.num_tokens, plan.hidden // SF_GROUP, generator=generator, device=plan.device)
    return x.to(DTYPES["fp8"]), sf


def _generator(plan: Plan, rank: int, stream: int) -> torch.Generator:
    return torch.Generator(device=plan.device).manual_seed((plan.seed * 1000003 + rank) * 7 + stream)
