"""How the test kit hands tensors to a backend."""

from __future__ import annotations

import torch

from deepep.testing.target import Target


def test_strides_are_kept_on_another_device() -> None:
    target, base = Target(device="meta"), torch.arange(48.0).view(4, 12)
    for tensor in (base, base.t(), base[:, ::2], base[1:, :1], base[:0]):
        placed = target.put(tensor)
        assert placed.device.type == "meta"
        assert placed.shape == tensor.shape
        assert placed.is_contiguous() == tensor.is_contiguous()
    assert target.put(base[:, ::2]).stride() == (12, 2)
