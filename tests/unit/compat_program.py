"""A `deep_ep` program that knows nothing of deepep: two spawned ranks, started by `test_compat_alias.py`."""

import importlib.util
import os
import subprocess
import sys

import deep_ep
import torch
import torch.distributed as dist
from deep_ep.utils.envs import dist_print, get_global_seed, get_local_seed, get_physical_domain_size, init_dist
from deep_ep.utils.refs import dispatch
from torch.multiprocessing.spawn import spawn

CHILD = "import deep_ep, sys; sys.stdout.write('grandchild ' + deep_ep.__version__)"


def worker(local_rank: int, num_local_ranks: int) -> None:
    assert importlib.util.find_spec("deep_ep.buffers.legacy") is not None
    rank, num_ranks, group = init_dist(local_rank, num_local_ranks, seed=3)
    assert (rank, num_ranks) == (local_rank, 2)
    assert (get_global_seed(), get_local_seed()) == (3, 6 + rank)
    assert torch.get_default_dtype() == torch.bfloat16
    assert get_physical_domain_size(group) == deep_ep.get_logical_domain_size(group) == (1, 2)
    assert deep_ep.get_logical_domain_size(group, allow_hybrid_mode=False) == (1, 2)
    check_dispatch(rank)
    for turn in range(num_ranks):
        dist_print(f"rank {rank} is done" if turn == rank else "", once_in_node=False)
    dist_print("printed once", once_in_node=True)
    dist.destroy_process_group()


def check_dispatch(rank: int) -> None:
    """Rank 1 has one token fewer; experts 0, 1 live on rank 0 and 2, 3 on rank 1."""
    topk_idx = torch.tensor([[[0, 2], [-1, 3]], [[1, 0], [-1, -1]]][rank])[: 2 - rank]
    x = torch.full((2 - rank, 16), 10.0 * rank).to(torch.float8_e4m3fn)
    sf = torch.arange(2 - rank, dtype=torch.float32).unsqueeze(1)
    weights = torch.full((2 - rank, 2), 0.5, dtype=torch.float32)
    rows = dispatch((x, sf), topk_idx, weights, 3, 4)
    expected = [
        ([0, 3], [[0, -1], [1, 0]], [[0.5, 0.0], [0.5, 0.5]], [0.0, 10.0], [0.0, 0.0]),
        ([0, 1], [[-1, 0], [-1, 1]], [[0.0, 0.5], [0.0, 0.5]], [0.0, 0.0], [0.0, 1.0]),
    ][rank]
    assert rows.src_token_global_idx.cpu().tolist() == expected[0]
    assert rows.topk_idx.tolist() == expected[1]
    assert rows.topk_weights.tolist() == expected[2]
    assert rows.x[0].float()[:, 7].tolist() == expected[3]
    assert rows.x[1].flatten().tolist() == expected[4]
    assert dispatch(x, topk_idx, None, 3, 4).topk_weights is None


if __name__ == "__main__":
    assert sys.argv[1:] == ["--flag", "value"]
    # Interpreters that a program starts by itself have the alias too.
    text = subprocess.run(
        [sys.executable, "-c", CHILD], env=os.environ, capture_output=True, text=True, check=True
    ).stdout
    print(text, flush=True)
    spawn(worker, args=(2,), nprocs=2)
    print("program finished", flush=True)
