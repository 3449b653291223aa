"""Options of the suite, and worker ranks: started once per backend and number of ranks, restarted after a failure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deepep.backends import registry
from deepep.testing.launch import Workers
from deepep.testing.target import ContractViolation, Target

_CALL_TIMEOUT = 120.0
_REASON_HALF = 1500  # characters


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


def pytest_exception_interact(
    node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any], report: pytest.CollectReport | pytest.TestReport
) -> None:
    """Say at once what failed and why, so that a run that is cut off by a time limit has said so."""
    reporter = node.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or call.excinfo is None:
        return
    error = call.excinfo.value
    reason = f"{type(error).__name__}: {error}"
    if error.__cause__ is not None:  # the traceback of the rank where it happened
        reason += f"\n{error.__cause__}"
    if len(reason) > 2 * _REASON_HALF:
        reason = f"{reason[:_REASON_HALF]}\n[...]\n{reason[-_REASON_HALF:]}"
    reporter.write(f"\nFAILED {report.nodeid}: {reason}\n", flush=True)


@pytest.fixture(scope="module")
def pair() -> Iterator[Workers]:
    """Two ranks, new ones for each file."""
    with Workers(2) as workers:
        yield workers


@pytest.fixture(scope="module")
def four() -> Iterator[Workers]:
    """Four of them."""
    with Workers(4) as workers:
        yield workers


@pytest.fixture(scope="session")
def kernels() -> None:
    """Compile where there is a GPU, before ranks do so in the middle of their first calls, at different speeds."""
    if registry.probe("ipc").availability.ok:
        from deepep.cuda import jit
        from deepep.cuda.kernels import kernel_specs

        major, minor = torch.cuda.get_device_capability()
        jit.compile_all(kernel_specs(), [f"sm_{major}{minor}"])


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest, kernels: None) -> Iterator[Ranks]:  # noqa: ARG001
    backend, num_ranks = request.param
    status = registry.probe(backend)
    if not status.availability.ok:
        pytest.skip(str(status))
    group = Ranks(Target(backend, request.config.getoption("--device")), num_ranks)
    yield group
    group.close()
