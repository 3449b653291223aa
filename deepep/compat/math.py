"""`deep_ep.utils.math`: rounding, comparing, hashing, and the per-token FP8 casts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deepep.errors import InvalidArgument
from deepep.layout import align
from deepep.quant import GROUP_SIZE, SfFormat, fp8_cast, fp8_uncast, ue8m0_to_float

__all__ = [
    "align",
    "calc_diff",
    "ceil_div",
    "count_bytes",
    "create_grouped_scores",
    "hash_tensor",
    "hash_tensors",
    "inplace_unique",
    "per_token_cast_back",
    "per_token_cast_to_fp8",
    "safe_div",
]


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """How different two tensors are: 0 for equal ones, up to about 1 (upstream API).

    With `a = x + 1` and `b = y + 1` in float64: `1 - 2 * sum(a * b) / sum(a * a + b * b)`. Empty tensors are equal.
    """
    a, b = x.double() + 1, y.double() + 1
    total = (a * a + b * b).sum()
    return 0.0 if total == 0 else (1 - 2 * (a * b).sum() / total).item()


def safe_div(a: float, b: float) -> float:
    """`a / b`, and 0 where `b` is 0: for rates of things that did not happen."""
    return 0.0 if b == 0 else a / b


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up, whole numbers."""
    return -(-a // b)


def per_token_cast_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast `[m, n]` to e4m3 with one scale factor per row and 128 channels (`quant.fp8_cast`); n is free.

    Returns:
        `[m, n]` float8_e4m3fn and `[m, ceil(n / 128)]` float32. A shorter last group counts as filled up with 0.
    """
    payload, sf = fp8_cast(_padded(x), SfFormat.FLOAT32)
    return payload[..., : x.shape[-1]].contiguous(), sf


def per_token_cast_back(x_fp8: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
    """Undo `per_token_cast_to_fp8`.

    Args:
        x_fp8: `[m, n]` float8_e4m3fn.
        sf: `[m, ceil(n / 128)]` float32, or `[m, ceil(n / 512)]` int32 holding four UE8M0 exponents each; any strides.

    Returns:
        `[m, n]` bfloat16.
    """
    scale = ue8m0_to_float(sf) if sf.dtype == torch.int32 else sf
    num_groups = ceil_div(x_fp8.shape[-1], GROUP_SIZE)
    return fp8_uncast(_padded(x_fp8), scale[..., :num_groups])[..., : x_fp8.shape[-1]].contiguous()


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Fill the last dimension up with zeros to whole groups."""
    num_missing = -x.shape[-1] % GROUP_SIZE
    if num_missing == 0:
        return x
    # Bytes, because FP8 tensors can hardly do anything else.
    filler = torch.zeros(*x.shape[:-1], num_missing * x.element_size(), dtype=torch.uint8, device=x.device)
    return torch.cat([x.contiguous().view(torch.uint8), filler], dim=-1).view(x.dtype)


def inplace_unique(x: torch.Tensor, num_slots: int) -> None:
    """Reduce every row of `x` to its distinct values, in place: descending, then -1 in the slots that are left.

    Args:
        x: `[T, K]` integers; negative entries are empty.
        num_slots: all values are below this.

    Raises:
        InvalidArgument: a value is `num_slots` or more.
    """
    if x.numel() and x.max() >= num_slots:
        raise InvalidArgument(f"inplace_unique: x holds {int(x.max())}; num_slots={num_slots} allows less than that")
    ordered = x.sort(dim=1, descending=True).values
    repeats = torch.zeros_like(ordered, dtype=torch.bool)
    repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    x.copy_(ordered.masked_fill(repeats | (ordered < 0), -1).sort(dim=1, descending=True).values)


def create_grouped_scores(scores: torch.Tensor, group_idx: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Zero the scores outside the chosen groups of experts: group-limited routing.

    Args:
        scores: `[T, E]`; group g holds the experts `[g * E / num_groups, (g + 1) * E / num_groups)`.
        group_idx: `[T, G]` int64, the groups that each token may use.
        num_groups: how many groups there are; divides E.

    Returns:
        `[T, E]`, a new tensor.
    """
    num_tokens, num_experts = scores.shape
    chosen = torch.zeros(num_tokens, num_groups, dtype=torch.bool, device=scores.device).scatter_(1, group_idx, True)
    return scores.masked_fill(~chosen.repeat_interleave(num_experts // num_groups, dim=1), 0)


def hash_tensor(t: torch.Tensor) -> int:
    """Sum of the bits of `t`, read as int32 (as bytes where their number is no multiple of 4): same bits, same hash."""
    flat = t.contiguous().view(-1).view(torch.uint8)
    if flat.numel() % 4 == 0:
        # A slice may start between two words.
        flat = (flat if flat.storage_offset() % 4 == 0 else flat.clone()).view(torch.int32)
    return int(flat.sum(dtype=torch.int64).item())


def hash_tensors(*nested: Any) -> int:
    """Sum of `hash_tensor` over all tensors in nested tuples, lists and mappings; anything else counts nothing."""
    return sum(hash_tensor(t) for t in _tensors(nested))


def count_bytes(*nested: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and mappings; anything else, as None, counts nothing."""
    return sum(t.numel() * t.element_size() for t in _tensors(nested))


def _tensors(nested: Any) -> Iterable[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, (tuple, list, Mapping)):
        for item in nested.values() if isinstance(nested, Mapping) else nested:
            yield from _tensors(item)
