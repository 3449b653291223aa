"""`deep_ep.utils.envs`: start-up of tests and benchmarks, and what the machine is made of."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
import torch.distributed as dist
from torch.utils import deterministic

from deepep.compat.links import check_fast_rdma_atomic_support, check_nvlink_connections, get_nvlink_gbs, get_rdma_gbs
from deepep.elastic_sizes import get_logical_domain_size, get_physical_domain_size
from deepep.errors import DeepEPError, InvalidArgument

__all__ = [
    "check_fast_rdma_atomic_support",
    "check_nvlink_connections",
    "check_torch_deterministic",
    "dist_print",
    "get_global_seed",
    "get_local_seed",
    "get_logical_domain_size",
    "get_nvlink_gbs",
    "get_physical_domain_size",
    "get_rdma_gbs",
    "init_dist",
    "init_seed",
]

DEFAULT_PORT = 8361
"""Where rank 0 listens if MASTER_PORT does not say."""

_local_rank: int | None = None
_seeds: tuple[int, int] | None = None


def init_dist(local_rank: int, num_local_ranks: int, seed: int = 0) -> tuple[int, int, dist.ProcessGroup]:
    """Initialise torch.distributed and this process for a test or a benchmark (upstream API).

    Reads MASTER_ADDR (127.0.0.1), MASTER_PORT (8361), WORLD_SIZE (1) as the number of **hosts** and RANK (0) as the
    number of this host. The default dtype becomes bfloat16; with a GPU, the current device becomes `local_rank` modulo
    the GPUs present, and the default device cuda. The backend is NCCL where every rank has a GPU of its own, gloo where
    ranks share one or there is none. Generators are seeded by `init_seed`.

    Args:
        local_rank: this process among those of its host.
        num_local_ranks: processes per host, equal on all hosts.
        seed: see `init_seed`.

    Returns:
        Rank, number of ranks, and a new process group of all ranks.

    Raises:
        InvalidArgument: `local_rank` is not below `num_local_ranks`.
    """
    global _local_rank
    if not 0 <= local_rank < num_local_ranks:
        raise InvalidArgument(f"local_rank={local_rank}: must be 0 to num_local_ranks - 1 = {num_local_ranks - 1}")
    num_ranks = int(os.environ.get("WORLD_SIZE", "1")) * num_local_ranks
    rank = int(os.environ.get("RANK", "0")) * num_local_ranks + local_rank
    num_gpus = torch.cuda.device_count()
    if num_gpus:
        torch.cuda.set_device(local_rank % num_gpus)
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", str(DEFAULT_PORT)))
    dist.init_process_group(
        "nccl" if num_local_ranks <= num_gpus else "gloo",
        init_method=f"tcp://{address}:{port}",
        world_size=num_ranks,
        rank=rank,
    )
    torch.set_default_dtype(torch.bfloat16)
    if num_gpus:
        torch.set_default_device("cuda")
    _local_rank = local_rank
    init_seed(seed)
    return rank, num_ranks, dist.new_group(list(range(num_ranks)))


def init_seed(seed: int) -> None:
    """Seed torch (CPU and GPU), numpy and `random` so that ranks draw different numbers and reruns draw the same.

    The local seed is `seed * num_ranks + rank`: no two ranks share one, whatever their global seeds are.
    """
    global _seeds
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    _seeds = seed, seed * num_ranks + rank
    torch.manual_seed(_seeds[1])
    random.seed(_seeds[1])
    np.random.seed(_seeds[1] % 2**32)  # noqa: NPY002 - programs that call this draw from the global generator


def get_global_seed() -> int:
    """The seed given to `init_seed`, equal on all ranks. Raises `DeepEPError` before that."""
    return _known_seeds()[0]


def get_local_seed() -> int:
    """The seed of this rank's generators. Raises `DeepEPError` before `init_seed`."""
    return _known_seeds()[1]


def _known_seeds() -> tuple[int, int]:
    if _seeds is None:
        raise DeepEPError("no seed yet: call init_dist or init_seed first")
    return _seeds


def dist_print(s: object = "", once_in_node: bool = False) -> None:
    """Print, then wait for all ranks (if torch.distributed is initialised), so that lines keep their order.

    Args:
        s: what to print.
        once_in_node: print on the first rank of each host only.
    """
    if not once_in_node or _current_local_rank() == 0:
        print(s, flush=True)
    if dist.is_initialized():
        dist.barrier()


def _current_local_rank() -> int:
    return _local_rank if _local_rank is not None else int(os.environ.get("LOCAL_RANK", "0"))


def check_torch_deterministic() -> None:
    """Raise `InvalidArgument` where torch would fill every new tensor, which costs more than what is measured."""
    if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        raise InvalidArgument(
            "torch.use_deterministic_algorithms(True) also fills uninitialised memory, which slows every buffer down; "
            "set torch.utils.deterministic.fill_uninitialized_memory = False"
        )
