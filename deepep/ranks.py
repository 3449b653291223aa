"""Where a program's ranks come from: torchrun, mpirun, or local processes started here. The caller need not care."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from deepep.errors import InvalidArgument
from deepep.group import Group, make_group

DEFAULT_NUM_RANKS = 4
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
_TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launcher(environ: Mapping[str, str] = os.environ) -> str | None:
    """Say who started this process as one of several: "torchrun", "mpi", or None."""
    if all(name in environ for name in _TORCH_VARIABLES):
        return "torchrun"
    return "mpi" if any(name in environ for name in _MPI_VARIABLES) else None


def run_on_ranks(
    fn: Callable[..., Any], *args: Any, num_ranks: int | None = None, device: str = "cpu", timeout: float = 600.0
) -> list[Any] | None:
    """Call `fn(group, *args)` on every rank, `group` being a `deepep.group.Group`.

    Under torchrun or mpirun the ranks are the processes that these started, and every one of them calls this.
    Otherwise local processes are spawned.

    Args:
        fn: at the top level of a module, picklable like `args` and what it returns (return CPU tensors).
        num_ranks: how many to spawn (4 where not given); under a launcher None, or what the launcher started.
        device: "cpu", or "cuda": then each rank works on GPU `local rank % number of GPUs`.
        timeout: seconds for the whole call.

    Returns:
        What every rank returned, in rank order; None on the other ranks of a launcher.

    Raises:
        InvalidArgument: `num_ranks` is below 1 or not what the launcher started, or CUDA is asked for and not there.
    """
    if num_ranks is not None and num_ranks < 1:
        raise InvalidArgument(f"num_ranks is {num_ranks}; it must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("device is 'cuda' and torch sees no GPU here; leave it out to work on the CPU")
    kind = launcher()
    if kind == "torchrun":
        return _under_torchrun(fn, args, num_ranks, device, timeout)
    if kind == "mpi":
        return _under_mpi(fn, args, num_ranks, device, timeout)
    from deepep.testing.launch import spawn

    return spawn(_on_process_group, num_ranks or DEFAULT_NUM_RANKS, fn, args, device=device, timeout=timeout)


def _on_process_group(process_group: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return fn(make_group(process_group), *args)


def _under_torchrun(
    fn: Callable[..., Any], args: tuple[Any, ...], num_ranks: int | None, device: str, timeout: float
) -> list[Any] | None:
    is_one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if is_one_host and any(name == "lo" for _, name in socket.if_nameindex()):
        # One host: without this gloo asks a resolver for the host's name, which containers often cannot answer.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _take_device(int(os.environ.get("LOCAL_RANK", "0")), device)
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("gloo")
    try:
        return _call(make_group(dist.group.WORLD), fn, args, num_ranks, timeout)
    finally:
        if is_ours:
            dist.destroy_process_group()


def _under_mpi(
    fn: Callable[..., Any], args: tuple[Any, ...], num_ranks: int | None, device: str, timeout: float
) -> list[Any] | None:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise InvalidArgument(
            f"mpirun started this process and mpi4py cannot be imported ({error}): pip install 'deepep[mpi]'"
        ) from error
    _take_device(MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).Get_rank(), device)
    try:
        return _call(make_group(comm=MPI.COMM_WORLD), fn, args, num_ranks, timeout)
    except BaseException:
        # Ranks that leave MPI by themselves would wait in its finalisation for those that still work.
        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
        raise


def _take_device(local_rank: int, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)


def _call(
    group: Group, fn: Callable[..., Any], args: tuple[Any, ...], num_ranks: int | None, timeout: float
) -> list[Any] | None:
    if num_ranks not in (None, group.num_ranks):
        raise InvalidArgument(f"num_ranks is {num_ranks} and the launcher started {group.num_ranks}; leave it out")
    results = group.all_gather_object(fn(group, *args), op="results", timeout=timeout)
    return results if group.rank == 0 else None
