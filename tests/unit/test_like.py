"""Tensors made from a plan's own are like those made from numbers."""

from __future__ import annotations

import pytest
import torch

from deepep.cuda.like import empty, like


@pytest.mark.parametrize("shape", [(3, 4), (1, 128), (2, 3, 5), (7,), (0, 128), (5, 0), (0,)])
@pytest.mark.parametrize("make", [(torch.empty_like, torch.empty), (torch.zeros_like, torch.zeros)])
def test_size_and_strides_are_those_of_a_new_tensor(shape: tuple[int, ...], make: tuple[object, object]) -> None:
    from_tensor, from_numbers = make
    given = like(shape, torch.bfloat16, torch.device("cpu"))
    got, wanted = from_tensor(given), from_numbers(shape, dtype=torch.bfloat16)  # type: ignore[operator]
    assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert got.untyped_storage().nbytes() == wanted.untyped_storage().nbytes()


def test_empty_is_new_each_time() -> None:
    first, second = (empty((3, 4), torch.float32, torch.device("cpu")) for _ in range(2))
    assert first.shape == second.shape == (3, 4)
    assert first.dtype is second.dtype is torch.float32
    assert first.data_ptr() != second.data_ptr()


def test_sizes_share_one_element() -> None:
    device = torch.device("cpu")
    first, second = (like(shape, torch.int32, device) for shape in ((3, 4), (5,)))
    assert first.data_ptr() == second.data_ptr()
    assert first.untyped_storage().nbytes() == 4
