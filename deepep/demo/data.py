"""scikit-learn's handwritten digits: 1797 images of 8 x 8 grey values, shipped with the package."""

from __future__ import annotations

from typing import NamedTuple

import torch

NUM_PIXELS, NUM_CLASSES = 64, 10
_MAX_GREY = 16.0
_TEST_FRACTION = 0.2


class Images(NamedTuple):
    """Pixels [n, 64] float64 in [0, 1] and digits [n] int64."""

    pixels: torch.Tensor
    digits: torch.Tensor


class Digits(NamedTuple):
    """Four fifths to learn from, one fifth held out."""

    train: Images
    test: Images


def load(seed: int, device: str) -> Digits:
    """Load and split the digits; the same split on every rank for one seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.data).double() / _MAX_GREY
    digits = torch.from_numpy(bunch.target).to(torch.int64)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    held_out = round(_TEST_FRACTION * len(digits))
    test, train = order[:held_out], order[held_out:]
    pixels, digits = pixels.to(device), digits.to(device)
    return Digits(Images(pixels[train], digits[train]), Images(pixels[test], digits[test]))
