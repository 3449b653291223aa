"""Groups over mpi4py, under a real `mpirun`. This file is also the program that the ranks run."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

NUM_RANKS = 3


def find_mpirun() -> str | None:
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def test_group_under_mpirun() -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed (pip install 'deepep[mpi]')")
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("there is no mpirun (pip install 'deepep[mpi]')")
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [mpirun, "-n", str(NUM_RANKS), "--oversubscribe", sys.executable, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("all is well") == NUM_RANKS


def check_exchange(group: Group, rows: int, dtype: torch.dtype) -> None:
    rank, ranks = group.rank, range(group.num_ranks)
    send = [torch.full((rows * ((rank + peer) % 3), 2), 10 * rank + peer).to(dtype) for peer in ranks]
    recv = [torch.zeros(rows * ((rank + peer) % 3), 2, dtype=dtype) for peer in ranks]
    group.exchange(send, recv, op="test", timeout=30.0)
    for peer in ranks:
        torch.testing.assert_close(recv[peer], torch.full_like(recv[peer], 10 * peer + rank))


def check_late_rank(group: Group) -> None:
    if group.rank == 1:
        time.sleep(3.0)
        group.barrier(op="test", timeout=1.0)  # what it missed has been sent to it before the others gave up
    with pytest.raises(CommTimeout) as caught:
        group.barrier(op="test", timeout=1.0)
    assert caught.value.missing_ranks == ((0, 2) if group.rank == 1 else (1,))
    with pytest.raises(BufferDestroyed):
        group.barrier(op="test", timeout=1.0)


def check_late_data(comm: Any, num_bytes: int = 4 << 20) -> None:
    """What a rank sends to those that gave up on it lands in no memory that others have by now."""
    pair = make_group(comm=comm)
    nothing, few, many = (torch.zeros(size, dtype=torch.uint8) for size in (0, 8, num_bytes))
    if comm.rank == 0:
        with pytest.raises(CommTimeout):
            pair.exchange([nothing, few], [nothing, many], op="test", timeout=0.5)
        del pair, many
        gc.collect()
        others = [torch.full((num_bytes,), 7, dtype=torch.uint8) for _ in range(20)]
        comm.Barrier()
        comm.Barrier()
        assert all(bool((other == 7).all()) for other in others)
    else:
        comm.Barrier()
        with pytest.raises(CommTimeout):
            pair.exchange([many + 9, nothing], [few, nothing], op="test", timeout=1.0)
        comm.Barrier()


def main() -> None:
    comm = MPI.COMM_WORLD
    group, other = make_group(comm=comm), make_group(comm=comm)
    assert (group.rank, group.num_ranks, group.raw) == (comm.rank, NUM_RANKS, comm)
    for rows, dtype in ((3, torch.bfloat16), (1, torch.float8_e4m3fn), (1 << 18, torch.float32)):
        check_exchange(group, rows, dtype)
    assert group.all_gather_object(comm.rank, op="test", timeout=30.0) == list(range(NUM_RANKS))
    check_late_rank(group)
    other.barrier(op="test", timeout=30.0)
    halves = make_group(comm=comm.Split(comm.rank % 2, comm.rank))
    assert halves.all_gather_object(comm.rank, op="test", timeout=30.0) == ([1] if comm.rank == 1 else [0, 2])
    if comm.rank != 1:
        check_late_data(comm.Create_group(comm.Get_group().Incl([0, 2])))
    print("all is well", flush=True)


if __name__ == "__main__":
    from mpi4py import MPI

    from deepep.errors import BufferDestroyed, CommTimeout
    from deepep.group import Group, make_group

    main()
