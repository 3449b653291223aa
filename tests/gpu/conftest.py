"""These tests need a GPU; ranks share it where there are fewer GPUs than ranks (start MPS first, or they are slow)."""

from __future__ import annotations

import pytest
import torch

from deepep.backends import registry


@pytest.fixture(autouse=True)
def _compiled(kernels: None) -> None:
    """Ranks find their kernels in the cache."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    status = registry.probe("ipc") if torch.cuda.is_available() else None
    if status is None or not status.availability.ok:
        reason = str(status) if status else "no GPU here"
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=reason))
