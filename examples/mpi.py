"""The layer of `spawn.py` on ranks that mpirun started. torch.distributed is never initialised.

    pip install 'deepep[mpi]'
    mpirun -n 4 python examples/mpi.py

On several hosts, a host file names them and how many ranks each may hold; all see the same files and reach each other
by ssh without a password:

    $ cat examples/hostfile
    node1 slots=4
    node2 slots=4
    $ mpirun -n 8 --hostfile examples/hostfile python examples/mpi.py

In containers: root needs OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, and more ranks than cores need
--oversubscribe.
"""

from __future__ import annotations

import torch
from mpi4py import MPI
from spawn import route_and_return

if __name__ == "__main__":
    torch.set_num_threads(1)
    error = route_and_return(None, comm=MPI.COMM_WORLD)
    print(f"rank {MPI.COMM_WORLD.Get_rank()}: error {error:.1e}", flush=True)
