"""Small `ElasticBuffer`s and batches for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch

import deepep

HIDDEN, NUM_TOPK, NUM_EXPERTS, MAX_TOKENS = 32, 3, 8, 9


def build(group: Any, **options: Any) -> Any:
    shape = {"num_max_tokens_per_rank": MAX_TOKENS, "hidden": HIDDEN, "num_topk": NUM_TOPK}
    return deepep.ElasticBuffer(group, backend="reference", timeout=30, **{**shape, **options})


def batch(group: Any, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_idx with holes, topk_weights of this rank."""
    random = torch.Generator().manual_seed(100 * seed + group.rank())
    num_tokens = MAX_TOKENS - group.rank() % 2
    x = torch.randn(num_tokens, HIDDEN, generator=random).bfloat16()
    topk_idx = torch.rand(num_tokens, NUM_EXPERTS, generator=random).topk(NUM_TOPK).indices
    topk_idx[torch.rand(topk_idx.shape, generator=random) < 0.2] = -1
    return x, topk_idx, torch.rand(num_tokens, NUM_TOPK, generator=random)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int16), other.view(torch.int16))
