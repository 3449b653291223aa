"""For tests of normal mode, as a pytest plugin: its kernels, compiled once, and memory that holds no old results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulator import NORMAL, Emulator


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "bulk"])
def normal_emulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """With bulk copies, as for GPUs from sm_90 on, and with ordinary loads and stores, as for those before."""
    return Emulator(tmp_path_factory.mktemp("emulated_normal"), NORMAL, is_hopper=request.param)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN or large numbers, not what an earlier test left there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
