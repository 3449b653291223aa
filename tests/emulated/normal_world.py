"""Ranks whose kernels of normal mode run on the emulator: engines over windows of the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
import torch
from emulator import Emulator
from fake_gpu import FakeKernel, fake_gpu

from deepep.backends.base import BackendOptions
from deepep.cuda import driver, engine, jit
from deepep.cuda.engine import Engine
from deepep.cuda.window import map_window
from deepep.testing.routing import Case

_POISON = 0xCD
Result = TypeVar("Result")


class NormalWorld:
    """R engines over windows of the same process.

    Args:
        monkeypatch: puts the emulator where the driver was.
        emulator: of the kernels.
        case: the largest that is to be run here.
        num_sms: multiprocessors of each rank.
        room: bytes of the window for rows; 0 for as many as there would be.
        timeout: seconds, by a clock that only runs while kernels do.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        emulator: Emulator,
        case: Case,
        num_sms: int = 2,
        room: int = 0,
        timeout: float = 5e-3,
    ) -> None:
        fake_gpu(monkeypatch, num_sms)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(jit, "load", lambda spec, _device: FakeKernel(emulator.handle(spec.name)))
        monkeypatch.setattr(driver, "ensure_context", lambda _device: None)
        monkeypatch.setattr(engine, "current_stream", lambda _device: 0)
        monkeypatch.setattr(engine, "runtime", lambda: emulator)
        monkeypatch.setattr(engine, "HostWords", _Words)
        monkeypatch.setattr(engine, "Copies", lambda _device: _Copies(emulator))
        emulator.forget()
        self.emulator, num_ranks = emulator, case.num_ranks
        options = BackendOptions(num_max_tokens_per_rank=case.num_max_tokens_per_rank, num_topk=case.num_topk)
        window_map = map_window(num_ranks, options)
        self._windows = [torch.zeros(window_map.num_bytes, dtype=torch.uint8) for _ in range(num_ranks)]
        for window in self._windows:
            window[window_map.payload :] = _POISON
        self._table = torch.tensor([window.data_ptr() for window in self._windows])
        self.engines = [
            self._engine(rank, options, num_ranks, timeout, room or window_map.payload_bytes)
            for rank in range(num_ranks)
        ]
        num_words = case.num_experts + num_sms * (case.num_experts + num_ranks)
        for one in self.engines:  # which would have it on a GPU
            one._scratch[case.num_experts] = torch.full((num_words,), -(1 << 30), dtype=torch.int32)

    def _engine(self, rank: int, options: BackendOptions, num_ranks: int, timeout: float, room: int) -> Engine:
        window_map = map_window(num_ranks, options)
        window_map.struct.payload_bytes = room
        memory = _Memory(self._windows[rank], self._table.data_ptr())
        return Engine(memory, window_map, rank, num_ranks, 0, 1, timeout)

    def on_all(self, call: Callable[[Engine], Result]) -> list[Result]:
        """Make the same call on every rank; while one waits for its kernels, the others go on."""
        left, results = list(self.engines), {}

        def go_on() -> None:
            while left:
                one = left.pop()
                self.emulator.queue = one.rank
                results[one.rank] = call(one)

        self.emulator.before_waiting = go_on
        go_on()
        return [results[rank] for rank in range(len(results))]

    def run(self, seed: int) -> None:
        """Run what has been launched, and raise what kernels report."""
        self.emulator.run(seed, ns_per_round=1_000)
        for one in self.engines:
            one.status.raise_error()


class _Words:
    """Host memory that kernels write."""

    def __init__(self, num_bytes: int) -> None:
        self.host = np.zeros(-(-num_bytes // 8), dtype=np.uint64)
        self.host_address = self.device_address = int(self.host.ctypes.data)

    def close(self) -> None:
        """Leave it to Python."""


class _Memory:
    """A window that is the memory of a tensor on the CPU."""

    def __init__(self, window: torch.Tensor, peer_table: int) -> None:
        self._window, self.base, self.peer_table = window, window.data_ptr(), peer_table

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        offset = tensor.data_ptr() - self.base
        return offset if 0 <= offset < self._window.numel() else None

    def as_tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return self._window[offset : offset + num_bytes].view(dtype).view(shape)


class _Copies:
    """The copy engine, whose work waits for its turn among launches."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator

    def fork(self, _stream: int) -> None:
        """There is one stream only."""

    join = fork

    def copy_beside(self, target: int, source: int, num_bytes: int) -> None:
        self._emulator.copy(target, source, num_bytes)

    def copy(self, target: int, source: int, num_bytes: int, _stream: int) -> None:
        self._emulator.copy(target, source, num_bytes)
