"""A `deep_ep` program that knows nothing of deepep: two spawned ranks, started by `test_compat_alias.py`."""

import importlib.util
import os
import subprocess
import sys

import deep_ep
import torch
import torch.distributed as dist
from deep_ep.utils.envs import dist_print, get_global_seed, get_local_seed, get_physical_domain_size, init_dist
from deep_ep.utils.math import calc_diff, per_token_cast_back
from deep_ep.utils.refs import combine, dispatch, generate_pre_combine_data
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
    check_buffer(rank, num_ranks, group)
    check_elastic(rank, num_ranks, group)
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


def check_buffer(rank: int, num_ranks: int, group: dist.ProcessGroup) -> None:
    """Both kinds of calls, under a default dtype and a default device that are not those of the tensors."""
    num_tokens, hidden, num_experts, num_topk = 5 + rank, 512, 8, 4
    x = torch.randn(num_tokens, hidden, device="cpu")
    topk_idx = torch.rand(num_tokens, num_experts, device="cpu").topk(num_topk).indices
    weights = torch.rand(num_tokens, num_topk, dtype=torch.float32, device="cpu")
    outputs = x[:, None].expand(-1, num_topk, -1)
    with torch.device("meta"):
        buffer = deep_ep.Buffer(group, 1 << 20, 1 << 20, low_latency_mode=True)
        layout = buffer.get_dispatch_layout(topk_idx, num_experts)
        recv_x, recv_topk_idx, recv_topk_weights, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=layout[0],
            num_tokens_per_rdma_rank=layout[1],
            num_tokens_per_expert=layout[2],
            is_token_in_rank=layout[3],
            topk_idx=topk_idx,
            topk_weights=weights,
        )
        combined_x, combined_weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_topk_weights)
        recv, counts, ll_handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, 8, num_experts)
        expert_x = per_token_cast_back(recv[0].flatten(0, 1), recv[1].flatten(0, 1)).view(recv[0].shape)
        ll_x, _, _ = buffer.low_latency_combine(expert_x, topk_idx, weights, ll_handle, use_logfmt=True)
    rows = dispatch(x, topk_idx, weights, 8, num_experts)
    assert torch.equal(recv_x, rows.x)
    assert torch.equal(recv_topk_idx, rows.topk_idx)
    assert torch.equal(recv_topk_weights, rows.topk_weights)
    assert torch.equal(combined_weights, weights)
    # Compact rows come back once per rank: at the highest position that chose it.
    owner = topk_idx // (num_experts // num_ranks)
    is_last = torch.stack([(owner[:, k + 1 :] != owner[:, k : k + 1]).all(dim=1) for k in range(num_topk)], dim=1)
    assert torch.equal(combined_x, combine(outputs, torch.where(is_last, topk_idx, -1), 1, num_ranks, num_experts))
    assert int(counts.sum()) == int((rows.topk_idx >= 0).sum())
    assert calc_diff(ll_x, x.float() * weights.sum(dim=1, keepdim=True)) < 1e-3


def check_elastic(rank: int, num_ranks: int, group: dist.ProcessGroup) -> None:
    """Expanded rows out and back, against the references; again under another default dtype and device."""
    num_tokens, num_max_tokens, hidden, num_experts, num_topk = 6 - rank, 6, 64, 8, 4
    x = torch.randn(num_tokens, hidden, device="cpu")
    topk_idx = torch.rand(num_tokens, num_experts, device="cpu").topk(num_topk).indices
    weights = torch.rand(num_tokens, num_topk, dtype=torch.float32, device="cpu")
    with torch.device("meta"):
        buffer = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=num_max_tokens, hidden=hidden)
        recv_x, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights, num_experts=num_experts, do_expand=True
        )
    rows = dispatch(x, topk_idx, weights, num_max_tokens, num_experts)
    assert torch.equal(handle.recv_src_metadata[:, 0].long(), rows.src_token_global_idx)
    # Expert outputs that every rank can make up: what this rank's experts return, and what comes home.
    outputs = generate_pre_combine_data(rows.src_token_global_idx, num_max_tokens, num_topk, hidden)
    place = handle.recv_src_metadata[:, 2:].long()
    expert_y = torch.full_like(recv_x, float("nan"))
    expert_y[place[place >= 0]] = outputs[place >= 0]
    with torch.device("meta"):
        combined_x, _, _ = buffer.combine(expert_y, handle)
    mine = torch.arange(num_tokens, device="cpu") + rank * num_max_tokens
    home = generate_pre_combine_data(mine, num_max_tokens, num_topk, hidden)
    assert torch.equal(combined_x, combine(home, topk_idx, 1, num_ranks, num_experts))


if __name__ == "__main__":
    assert sys.argv[1:] == ["--flag", "value"]
    # Interpreters that a program starts by itself have the alias too.
    text = subprocess.run(
        [sys.executable, "-c", CHILD], env=os.environ, capture_output=True, text=True, check=True
    ).stdout
    print(text, flush=True)
    spawn(worker, args=(2,), nprocs=2)
    print("program finished", flush=True)
