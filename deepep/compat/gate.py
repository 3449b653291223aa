"""`deep_ep.utils.gate`: routing scores with a known imbalance."""

from __future__ import annotations

import torch

from deepep.errors import InvalidArgument

__all__ = ["get_unbalanced_scores"]


def get_unbalanced_scores(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float = 1.0, precise: bool = False
) -> torch.Tensor:
    """Make scores whose top-k sends rank 0 `ratio` times as many choices as a rank gets on average.

    The other ranks share the rest evenly, in expectation. A token cannot choose more than `min(num_topk, experts of a
    rank)` experts of rank 0, which bounds the ratio that can be reached.

    Args:
        num_tokens: T.
        num_experts: E, a multiple of `num_ranks`.
        num_ranks: R.
        num_topk: K, at most E.
        ratio: load of rank 0 over the mean load, at least 1; 1 is balanced.
        precise: hit the ratio to within one choice over all tokens; otherwise only in expectation.

    Returns:
        `[T, E]` float32 in `[0, 3)` on the default device, for `torch.topk`, drawn from torch's default generator.

    Raises:
        InvalidArgument: a number is out of range.
    """
    _check(num_experts, num_ranks, num_topk, ratio)
    num_local_experts = num_experts // num_ranks
    hot_choices = min(num_topk * ratio / num_ranks, num_topk, num_local_experts)
    per_token = _hot_choices_per_token(num_tokens, hot_choices, precise)
    scores = torch.rand(num_tokens, num_experts, dtype=torch.float32)
    # Three bands: the chosen experts of rank 0 above those of other ranks, the rest of rank 0 below.
    hot = scores[:, :num_local_experts]
    place = hot.argsort(dim=1, descending=True).argsort(dim=1)
    lift = (place < per_token.unsqueeze(1)).float() * 2
    scores[:, num_local_experts:] += 1
    hot += lift
    return scores


def _hot_choices_per_token(num_tokens: int, mean: float, precise: bool) -> torch.Tensor:
    """Whole numbers, `[T]` int64, around `mean`: evenly spread where `precise`, otherwise rounded by chance."""
    if precise:
        # The small addend keeps products such as 3 * (1 / 3) from falling below the whole number that is meant.
        total = torch.floor(torch.arange(num_tokens + 1, dtype=torch.float64) * mean + 1e-9)
        return total.diff().long()
    return torch.floor(mean + torch.rand(num_tokens, dtype=torch.float64)).long()


def _check(num_experts: int, num_ranks: int, num_topk: int, ratio: float) -> None:
    if num_ranks < 1 or num_experts < 1 or num_experts % num_ranks:
        raise InvalidArgument(f"num_experts={num_experts}: must be a positive multiple of num_ranks={num_ranks}")
    if not 1 <= num_topk <= num_experts:
        raise InvalidArgument(f"num_topk={num_topk}: must be 1 to num_experts={num_experts}")
    if not ratio >= 1:
        raise InvalidArgument(f"ratio={ratio}: load of rank 0 over the mean, at least 1")
