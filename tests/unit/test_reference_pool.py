"""Memory of the reference backend is used again only when no tensor lies in it any more."""

from __future__ import annotations

import torch

from deepep.backends.reference.pool import RowPool

CPU = torch.device("cpu")


def test_memory_returns_when_the_last_view_is_gone() -> None:
    pool = RowPool()
    rows = pool.empty(1000, 1024, torch.float32, CPU)
    assert rows.shape == (1000, 1024)
    assert rows.is_contiguous()
    address, view = rows.data_ptr(), rows[10:20]
    del rows
    assert pool.empty(1000, 1024, torch.float32, CPU).data_ptr() != address
    view.fill_(1.0)
    del view
    again = pool.empty(900, 1024, torch.float32, CPU)
    assert again.data_ptr() == address or pool.num_idle_bytes > 0
    assert address in {again.data_ptr(), pool.empty(900, 1024, torch.float32, CPU).data_ptr()}


def test_small_and_empty_rows_are_ordinary() -> None:
    pool = RowPool()
    assert pool.empty(0, 7168, torch.int64, CPU).shape == (0, 7168)
    assert pool.empty(3, 8, torch.float8_e4m3fn, CPU).dtype == torch.float8_e4m3fn


def test_cleared_memory_is_not_used_again() -> None:
    pool = RowPool()
    rows = pool.empty(2000, 1024, torch.int64, CPU)
    del rows
    assert pool.num_idle_bytes == 2000 * 1024 * 8
    pool.clear()
    assert pool.num_idle_bytes == 0
