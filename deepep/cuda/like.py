"""Tensors to take a size from: `torch.empty_like` is quicker than `torch.empty` with numbers, by a microsecond."""

from __future__ import annotations

import functools
import math

import torch


def like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Give `torch.empty_like` what it makes a contiguous tensor of this size from: one element, shown everywhere."""
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device=device)  # holds nothing, and has the strides of its shape
    return _element(dtype, device).expand(shape)


@functools.cache
def _element(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Give the same one to all plans: made inside a graph capture, it would hold on to that graph's memory."""
    return torch.empty(1, dtype=dtype, device=device)
