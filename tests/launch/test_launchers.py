"""However the ranks are launched, they move the same bits."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from launched import DEMO, REPOSITORY, digests, finish, torchrun

needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin") is None
    or importlib.util.find_spec("mpi4py") is None,
    reason="mpirun or mpi4py is missing: pip install 'deepep[mpi]'",
)


def mpirun(*args: str) -> list[str]:
    found = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    return [found, "-n", "4", "--oversubscribe", sys.executable, *args]


@needs_mpi
def test_mpirun_moves_the_same_rows_as_spawn(spawned: dict[int, str]) -> None:
    (printed,) = finish([mpirun(*DEMO)])
    assert digests(printed) == spawned


def test_torchrun_moves_the_same_rows_as_spawn(spawned: dict[int, str]) -> None:
    (printed,) = finish([torchrun("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "4", *DEMO)])
    assert digests(printed) == spawned


@pytest.mark.parametrize("name", ["spawn", "low_latency"])
def test_examples_that_spawn_run(name: str) -> None:
    (printed,) = finish([[sys.executable, str(REPOSITORY / "examples" / f"{name}.py")]])
    assert "error on any rank" in printed


@needs_mpi
def test_the_mpi_example_runs() -> None:
    (printed,) = finish([mpirun(str(REPOSITORY / "examples" / "mpi.py"))])
    assert printed.count(": error") == 4


def test_the_torchrun_example_runs() -> None:
    script = str(REPOSITORY / "examples" / "torchrun.py")
    (printed,) = finish([torchrun("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", script)])
    assert printed.count(": error") == 2
