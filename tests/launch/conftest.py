"""What every launcher is compared with."""

from __future__ import annotations

import sys

import pytest
from launched import DEMO, digests, finish


@pytest.fixture(scope="session")
def spawned() -> dict[int, str]:
    """The hash of each rank's rows when four local processes are spawned."""
    (printed,) = finish([[sys.executable, *DEMO, "--num-ranks", "4"]])
    found = digests(printed)
    assert sorted(found) == [0, 1, 2, 3]
    assert "loss curve equals" in printed
    return found
