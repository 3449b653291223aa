"""What host code asks of a GPU that is not there."""

from __future__ import annotations

import pytest

from deepep.cuda import driver


class FakeKernel:
    """A kernel as grids and launches see it."""

    shared_bytes = 16 << 10

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def set_max_smem(self, num_bytes: int) -> None:
        """Shared memory is as large as asked for."""

    def blocks_per_sm(self, _num_threads: int, _smem: int) -> int:
        return 1


def fake_gpu(monkeypatch: pytest.MonkeyPatch, num_sms: int) -> None:
    """Let the driver tell of so many multiprocessors, each with the shared memory of Hopper."""
    known = {"CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": num_sms}
    monkeypatch.setattr(driver, "device_attribute", lambda name, _device: known.get(name, 227 << 10))
