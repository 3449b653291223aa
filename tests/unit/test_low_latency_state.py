"""The block that a low-latency dispatch leaves: allocated behind the launch before, where that is safe."""

from __future__ import annotations

import pytest
import torch

from deepep.cuda.like import like as make_like
from deepep.cuda.ll_state import NextBlock

DEFAULT, OTHER = 0, 17


@pytest.fixture
def like() -> torch.Tensor:
    return make_like((64,), torch.int32, torch.device("cpu"))


def test_the_next_block_is_given_out_once(like: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = NextBlock()
    blocks.allocate(like, DEFAULT)
    assert blocks._block is not None
    address = blocks._block.data_ptr()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda _: pytest.fail("one was allocated already"))
        first = blocks.take(like, DEFAULT)
    second = blocks.take(like, DEFAULT)
    assert first.data_ptr() == address != second.data_ptr()
    assert first.shape == second.shape == like.shape
    assert first.dtype is second.dtype is torch.int32


def test_other_streams_and_other_sizes_get_blocks_of_their_own(like: torch.Tensor) -> None:
    blocks = NextBlock()
    blocks.allocate(like, DEFAULT)
    assert blocks._block is not None
    address = blocks._block.data_ptr()
    other = make_like((65,), torch.int32, torch.device("cpu"))
    on_another, larger = blocks.take(like, OTHER), blocks.take(other, DEFAULT)
    assert address not in (on_another.data_ptr(), larger.data_ptr())
    assert larger.shape == other.shape
    assert blocks.take(like, DEFAULT).data_ptr() == address


def test_nothing_is_allocated_ahead_for_a_stream_that_may_be_captured(like: torch.Tensor) -> None:
    blocks = NextBlock()
    blocks.allocate(like, OTHER)
    assert blocks._block is None


def test_memory_that_runs_out_is_the_next_calls_problem(like: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    blocks = NextBlock()
    blocks.allocate(like, DEFAULT)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", run_out)
        blocks.allocate(like, DEFAULT)
        with pytest.raises(torch.OutOfMemoryError):
            blocks.take(like, DEFAULT)
    blocks.allocate(like, DEFAULT)
    assert blocks._block is None, "memory is tight: it is not asked for again before its time"
