"""What low latency makes of the words that kernels leave: which error, about whom, and for how long."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deepep import BufferDestroyed, CommTimeout, InvalidArgument
from deepep.backends.ipc.low_latency import LowLatency
from deepep.cuda import ll_engine, ll_structs
from deepep.cuda.ll_plan import Launch
from deepep.cuda.ll_structs import LlState, Shape

NUM_RANKS = 3


@pytest.fixture(autouse=True)
def _no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class FakeMemory:
    """A window that is all state."""

    is_alive = True

    def __init__(self) -> None:
        self.bytes = torch.zeros(4096, dtype=torch.uint8)

    def as_tensor(self, offset: int, shape: tuple[int], dtype: torch.dtype) -> torch.Tensor:
        return self.bytes[offset : offset + shape[0] * dtype.itemsize].view(dtype)


def make(enable_shrink: bool) -> Any:
    low_latency: Any = object.__new__(LowLatency)
    low_latency._group = SimpleNamespace(num_ranks=NUM_RANKS, rank=0)
    low_latency._options = SimpleNamespace(timeout=1.0, enable_shrink=enable_shrink)
    low_latency._memory = FakeMemory()
    low_latency._status = SimpleNamespace(host=np.zeros(2 + NUM_RANKS, dtype=np.uint64))
    return low_latency


def test_sizes_are_compared_before_the_window_is_divided() -> None:
    low_latency = make(enable_shrink=False)
    ours, theirs = (Shape(NUM_RANKS, 6, 2, num_max_tokens, 128) for num_max_tokens in (8, 9))
    low_latency._group.all_gather_object = lambda *_args, **_kwargs: [ours, ours, ours]
    low_latency._agree(ours)
    low_latency._group.all_gather_object = lambda *_args, **_kwargs: [ours, theirs, ours]
    for mine in (ours, theirs):
        with pytest.raises(InvalidArgument, match="num_max_tokens: rank 0 has 8 and rank 1 has 9"):
            low_latency._agree(mine)


def test_rows_that_kernels_cannot_number_are_refused() -> None:
    ll_structs.divide(Shape(8, 256, 8, 16384, 8192))
    with pytest.raises(InvalidArgument, match=r"32 experts.*at most 68719476736 bytes"):
        ll_structs.divide(Shape(8, 256, 8, 16385, 8192))


def test_a_hook_does_not_outlive_its_window() -> None:
    engine: Any = SimpleNamespace(is_over=True)
    hook = ll_engine._SecondPhase(engine, Launch(0, 1, 0, 0), ll_structs.LlCombineArgs(), 0, ())
    with pytest.raises(BufferDestroyed, match="the hook comes after its buffer was destroyed"):
        hook()


def test_a_missing_rank_is_named_by_every_later_call() -> None:
    low_latency = make(enable_shrink=False)
    low_latency._check_status()
    low_latency._status.host[[0, 1 + 2]] = 1
    for _ in range(2):
        with pytest.raises(CommTimeout, match="low_latency_dispatch") as caught:
            low_latency._check_status()
        assert caught.value.missing_ranks == (2,)


def test_an_index_out_of_range_is_said_once() -> None:
    low_latency = make(enable_shrink=False)
    low_latency._status.host[[0, 1 + NUM_RANKS]] = ll_structs.BAD_INDEX, 77
    with pytest.raises(InvalidArgument, match="expert 77"):
        low_latency._check_status()
    low_latency._check_status()


def test_a_lost_rank_is_named_after_an_index_out_of_range() -> None:
    low_latency = make(enable_shrink=False)
    low_latency._status.host[[0, 1 + 1, 1 + NUM_RANKS]] = ll_structs.BAD_INDEX, 1, 77
    with pytest.raises(InvalidArgument, match="expert 77"):
        low_latency._check_status()
    with pytest.raises(CommTimeout):
        low_latency._check_status()


def test_a_rank_taken_back_is_named_until_windows_are_clean() -> None:
    low_latency = make(enable_shrink=True)
    stale = low_latency._per_rank(LlState.is_stale.offset)
    stale[1] = stale[2] = 1
    low_latency.update_mask(2, True)
    for _ in range(2):  # kernels of either call say so
        low_latency._status.host[[0, 1 + 1]] = ll_structs.NOT_CLEANED, 1
        with pytest.raises(InvalidArgument, match=re.escape("rank(s) [1] were masked")):
            low_latency._check_status()
    low_latency._status.host[[0, 1 + 1]] = ll_structs.NOT_CLEANED, 1
    stale.zero_()  # cleaned before the host looked
    low_latency._check_status()
    assert not low_latency._status.host.any()


def test_a_rank_lost_without_masks_is_never_taken_for_one_taken_back() -> None:
    low_latency = make(enable_shrink=False)
    low_latency._per_rank(LlState.is_stale.offset)[1] = 1
    low_latency.update_mask(1, True)  # as kernels do when they give up
    low_latency._status.host[[0, 1 + 1]] = ll_structs.NOT_CLEANED, 1
    with pytest.raises(CommTimeout) as caught:
        low_latency._check_status()
    assert caught.value.missing_ranks == (1,)
