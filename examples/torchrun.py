"""The layer of `spawn.py` on ranks that torchrun started, one host or several.

    torchrun --nproc-per-node 4 examples/torchrun.py

On two hosts, the same command on each of them (the first address is that of the first host):

    export MASTER="--master-addr 192.0.2.1 --master-port 29500"
    torchrun --nnodes 2 --nproc-per-node 4 --node-rank 0 $MASTER examples/torchrun.py
    torchrun --nnodes 2 --nproc-per-node 4 --node-rank 1 $MASTER examples/torchrun.py

GLOO_SOCKET_IFNAME names the network card to use where gloo finds none or the wrong one: `lo` within one host, `eth0`
and the like between hosts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from spawn import route_and_return

if __name__ == "__main__":
    torch.set_num_threads(1)
    # A CPU group is enough, also where tensors are on GPUs: deepep needs it to get the ranks together.
    dist.init_process_group("gloo")
    error = route_and_return(dist.group.WORLD)
    print(f"rank {dist.get_rank()}: error {error:.1e}", flush=True)
    dist.destroy_process_group()
