"""What calls on one window leave for each other: their order, and memory that was given out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from deepep.cuda import driver
from deepep.cuda.call_order import CallOrder
from deepep.cuda.engine import Engine
from deepep.errors import InvalidArgument

BF16 = torch.bfloat16


class FakeDriver:
    """Notes what is recorded and waited for; `captured` streams are under capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, int]] = []
        self.captured: set[int] = set()
        monkeypatch.setattr(driver, "call", self.call)

    def call(self, name: str, *args: Any) -> Any:
        if name == "cuStreamIsCapturing":
            return args[0] in self.captured
        if name == "cuEventCreate":
            return "event"
        if name == "cuEventRecord":
            self.done.append(("record", args[1]))
        elif name == "cuStreamWaitEvent":
            self.done.append(("wait", args[0]))
        return None


def call_on(order: CallOrder, *streams: int) -> None:
    for stream in streams:
        order.enter(stream)
        order.leave(stream)


def test_calls_on_another_stream_wait_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, order = FakeDriver(monkeypatch), CallOrder()
    call_on(order, 7, 7)
    assert not fake.done
    call_on(order, 0, 0)
    # From now on each call is recorded behind itself, so that nothing else on its stream is waited for.
    assert fake.done == [("record", 7), ("wait", 0), ("record", 0), ("record", 0)]
    order.leave(5)  # of another kind, which is not kept in order
    call_on(order, 7)
    assert fake.done[4:] == [("wait", 7), ("record", 7)]
    order.close()
    order.close()


def test_graphs_hold_their_own_work_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, order = FakeDriver(monkeypatch), CallOrder()
    call_on(order, 0)
    fake.captured = {5, 6}
    call_on(order, 5)
    assert not fake.done
    call_on(order, 6)  # forked from 5
    assert fake.done == [("record", 5), ("wait", 6)]
    fake.captured = {5}  # another one, while what was recorded is of the first
    call_on(order, 5)
    assert not fake.done[2:]
    fake.captured = set()
    call_on(order, 0)
    assert fake.done[2:] == [("record", 5), ("wait", 0), ("record", 0)]


class Memory:
    """A window on the CPU."""

    def __init__(self, num_bytes: int) -> None:
        self.window = torch.zeros(num_bytes, dtype=torch.uint8)

    def as_tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.window[offset : offset + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)


def _engine(payload_bytes: int) -> Engine:
    fake: Any = object.__new__(Engine)
    fake.window_map = SimpleNamespace(payload=4096, payload_bytes=payload_bytes, num_bytes=payload_bytes + 4096)
    fake.memory, fake._inputs, fake._input_bytes = Memory(payload_bytes + 4096), {}, 0
    return cast(Engine, fake)


@pytest.mark.parametrize("kinds", [("dispatch", "combine"), ("combine", "dispatch")])
def test_input_buffers_keep_their_places(kinds: tuple[str, str]) -> None:
    engine = _engine(1 << 20)
    first = engine.input_buffer(kinds[0], (16, 512), BF16)
    second = engine.input_buffer(kinds[1], (16, 512), BF16)
    larger = engine.input_buffer(kinds[0], (32, 512), BF16)
    for number, tensor in enumerate((first, second, larger)):
        tensor.fill_(number)
    assert [int(tensor[0, 0]) for tensor in (first, second, larger)] == [0, 1, 2]
    # What is lowest grows where it is, and what is there is given again.
    grown = engine.input_buffer(kinds[0], (64, 512), BF16)
    assert grown.data_ptr() == larger.data_ptr() - 32 * 512 * 2
    assert engine.input_buffer(kinds[0], (8, 512), BF16).data_ptr() == grown.data_ptr()
    assert int(second[0, 0]) == 1
    assert engine.ring_bytes == (1 << 20) - (16 + 16 + 64) * 512 * 2


def test_input_buffers_leave_half_to_rings() -> None:
    engine = _engine(1 << 20)
    engine.input_buffer("dispatch", (256, 1024), BF16)
    with pytest.raises(InvalidArgument, match=r"get_combine_input_buffer: .* do not fit half of this window"):
        engine.input_buffer("combine", (1, 8), BF16)


def test_what_only_one_rank_sees_is_refused_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(1 << 20)
    launched: list[bool] = []
    monkeypatch.setattr(Engine, "barrier_launch", lambda _self, *, is_refusal: launched.append(is_refusal))
    with pytest.raises(InvalidArgument, match="too small"), engine.refusing():
        raise InvalidArgument("too small")
    assert launched == [True]
