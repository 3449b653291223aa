"""Options of the suite, and worker ranks: started once per backend and number of ranks, restarted after a failure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deepep.backends import registry
from deepep.testing.launch import Workers
from deepep.testing.target import ContractViolation, Target

_CALL_TIMEOUT = 120.0


class Ranks:
    """Living worker ranks and the backend to test on them."""

    def __init__(self, target: Target, num_ranks: int) -> None:
        self.target = target
        self.num_ranks = num_ranks
        self._workers: Workers | None = None

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `fn(group, *args)` on every rank; what each returned."""
        if self._workers is None:
            self._workers = Workers(self.num_ranks, device=self.target.device)
        try:
            return self._workers.run(fn, *args, timeout=_CALL_TIMEOUT)
        except ContractViolation:
            raise  # collected without breaking off communication: the ranks are in step
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deepep", "what the contract tests run on")
    group.addoption(
        "--backend",
        default=os.environ.get("DEEPEP_TEST_BACKEND", "reference"),
        help="backends under test, comma-separated (default: reference, or DEEPEP_TEST_BACKEND)",
    )
    group.addoption(
        "--ranks",
        default=os.environ.get("DEEPEP_TEST_RANKS", "1,2,3,4"),
        help="numbers of ranks to test with, comma-separated (default: 1,2,3,4, or DEEPEP_TEST_RANKS)",
    )
    group.addoption(
        "--device",
        default=os.environ.get("DEEPEP_TEST_DEVICE", "cpu"),
        choices=("cpu", "cuda"),
        help="where tensors live (default: cpu, or DEEPEP_TEST_DEVICE)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ranks" in metafunc.fixturenames:
        backends = metafunc.config.getoption("--backend").split(",")
        counts = [int(count) for count in metafunc.config.getoption("--ranks").split(",")]
        pairs = [(backend, count) for backend in backends for count in counts]
        names = [f"{backend}-R{count}" for backend, count in pairs]
        metafunc.parametrize("ranks", pairs, ids=names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    backend, num_ranks = request.param
    status = registry.probe(backend)
    if not status.availability.ok:
        pytest.skip(str(status))
    group = Ranks(Target(backend, request.config.getoption("--device")), num_ranks)
    yield group
    group.close()
