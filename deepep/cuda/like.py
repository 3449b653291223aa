"""New tensors by `torch.empty_like`, which is quicker than `torch.empty` with numbers by a microsecond."""

from __future__ import annotations

import functools
import math

import torch

_MOST_SIZES = 1024


@functools.lru_cache(_MOST_SIZES)
def like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Give `torch.empty_like` what it makes a contiguous tensor of this size from: one element, shown everywhere."""
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device=device)  # holds nothing, and has the strides of its shape
    return _element(dtype, device).expand(shape)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate what `torch.empty` would, where the size is one that comes again."""
    return torch.empty_like(like(shape, dtype, device))


@functools.cache
def _element(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Give the same one to all sizes: made inside a graph capture, it would hold on to that graph's memory."""
    return torch.empty(1, dtype=dtype, device=device)
